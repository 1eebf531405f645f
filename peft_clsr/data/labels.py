"""Labels of a transcript."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..languages.tags import language_code

# The decoder of every published Whisper has this many positions; the config of another says max_target_positions.
MAX_LABEL_LENGTH = 448

# The timestamp tokens are <|0.00|>, <|0.02|>, ... <|30.00|>.
SECONDS_PER_TIMESTAMP = 0.02
_SPECIAL_TOKEN = re.compile(r"<\|[^<>|]*\|>")


def encode_labels(tokenizer: Any, text: str, language: str, task: str = "transcribe") -> list[int]:
    """
    Encode a transcript as labels: `<|language|><|task|><|notimestamps|> text<|endoftext|>`.

    The text gets one leading space, as in OpenAI's training data (" word" and "word" are different tokens).
    `<|startoftranscript|>` is left out: the model adds it when it shifts the labels right.

    Args:
        tokenizer (`WhisperTokenizer`): A multilingual Whisper tokenizer.
        text (`str`): The transcript. Empty, where nobody speaks: no token stands between prompt and end.
        language (`str`):
            The Whisper language of the prompt, name or code: "catalan" or "ca". For a language that Whisper does not
            know, the `prompt_language` of its adapter.
        task (`str`, *optional*, defaults to `"transcribe"`): "transcribe" or "translate".

    Returns:
        `list[int]`: token ids.

    Raises:
        ValueError: an unknown language or task, or one that the tokenizer has no token for; a text with special
            tokens, see [`check_transcript`].
    """
    prompt_ids = _prompt_ids(tokenizer, language, task, "<|notimestamps|>")
    return [*prompt_ids, *check_transcript(tokenizer, text), tokenizer.eos_token_id]


def encode_segments(
    tokenizer: Any,
    segments: Iterable[tuple[float, float, str]],
    language: str,
    task: str = "transcribe",
    open_start: float | None = None,
) -> list[int]:
    """
    Encode transcripts with times as labels: `<|language|><|task|><|start|> text<|end|>...<|endoftext|>`.

    Args:
        tokenizer (`WhisperTokenizer`): A multilingual Whisper tokenizer with timestamps.
        segments (`Iterable[tuple[float, float, str]]`):
            Start and end in seconds from the beginning of the window, and transcript, in the order of speech. Times
            are rounded to 0.02 s. Without segments, where nobody speaks, the labels are
            `<|language|><|task|><|0.00|><|endoftext|>`: a decoder with timestamps begins with one in any case.
        language (`str`): As in [`encode_labels`].
        task (`str`, *optional*, defaults to `"transcribe"`): "transcribe" or "translate".
        open_start (`float`, *optional*):
            Start in seconds of a further segment, which the end of the window cuts. The labels end with its start
            alone, as in Whisper's own training (Radford et al. 2022, section 2.3): `...<|end|><|start|><|endoftext|>`.

    Returns:
        `list[int]`: token ids.

    Raises:
        ValueError: as [`encode_labels`]; a time has no token, or is before another one.
    """
    labels = _prompt_ids(tokenizer, language, task, "<|0.00|>")
    first = labels.pop()
    last_step = 0
    for start, end, text in segments:
        steps = [round(seconds / SECONDS_PER_TIMESTAMP) for seconds in (start, end)]
        if not last_step <= steps[0] <= steps[1]:
            raise ValueError(
                f"the segment {text!r} from {start:.2f} to {end:.2f} s begins before the end of another one, or ends "
                "before its start: expected segments in the order of speech"
            )
        last_step = steps[1]
        labels += [first + steps[0], *check_transcript(tokenizer, text), first + steps[1]]
    if not labels[2:] and open_start is None:
        labels.append(first)
    if open_start is not None:
        last_step = max(last_step, round(open_start / SECONDS_PER_TIMESTAMP))
        labels.append(first + last_step)
    last_token = f"<|{last_step * SECONDS_PER_TIMESTAMP:.2f}|>"
    if tokenizer.convert_tokens_to_ids(last_token) != first + last_step:
        raise ValueError(f"the tokenizer has no token {last_token} for the last segment: cut the audio before it")
    return [*labels, tokenizer.eos_token_id]


def encode_prompt(tokenizer: Any, text: str, max_length: int) -> list[int]:
    """
    Encode the text before a window as a prompt: `<|startofprev|> text`. It goes before `<|startoftranscript|>`.

    Args:
        tokenizer (`WhisperTokenizer`): A Whisper tokenizer.
        text (`str`): The text. Its end is kept if it is too long.
        max_length (`int`): Most tokens, with `<|startofprev|>`.

    Returns:
        `list[int]`: token ids, empty if there is no room for a token of text.
    """
    if max_length < 2:
        return []
    return [tokenizer.convert_tokens_to_ids("<|startofprev|>"), *check_transcript(tokenizer, text)[1 - max_length :]]


def has_timestamps(tokenizer: Any) -> bool:
    """True if a Whisper tokenizer has the timestamp tokens."""
    return tokenizer.convert_tokens_to_ids("<|0.00|>") not in (None, tokenizer.unk_token_id)


def _prompt_ids(tokenizer: Any, language: str, task: str, last: str) -> list[int]:
    if task not in ("transcribe", "translate"):
        raise ValueError(f"task {task!r} is unknown: expected 'transcribe' or 'translate'")
    prompt = [f"<|{language_code(language)}|>", f"<|{task}|>", last]
    prompt_ids = tokenizer.convert_tokens_to_ids(prompt)
    for token, token_id in zip(prompt, prompt_ids, strict=True):
        # Whisper's unknown token is <|endoftext|>, so a missing token would end the labels silently.
        if token_id is None or token_id == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no token {token}: use a multilingual Whisper that knows it")
    return prompt_ids


def check_transcript(tokenizer: Any, text: str) -> list[int]:
    """
    Encode a transcript without prompt and end, with one leading space.

    Transcripts that Whisper itself made may hold timestamps ("<|0.00|> un<|0.50|>") and prompts
    ("<|startoftranscript|>"). As tokens they would contradict the prompt of the labels or end them in the middle. A
    tokenizer without timestamps would spell them out.

    Args:
        tokenizer (`WhisperTokenizer`): A Whisper tokenizer.
        text (`str`): The transcript.

    Returns:
        `list[int]`: token ids.

    Raises:
        ValueError: the text holds `<|...|>` or another special token of the tokenizer.
    """
    if not text.strip():
        return []  # " " alone would be a token
    ids = tokenizer(" " + text.strip(), add_special_tokens=False).input_ids
    found = _SPECIAL_TOKEN.findall(text) or tokenizer.convert_ids_to_tokens(
        sorted(set(ids).intersection(tokenizer.all_special_ids), key=ids.index)
    )
    if found:
        raise ValueError(
            f"the transcript {text!r} holds the special token{'s' * (len(found) > 1)} {', '.join(found)}, expected "
            r"words alone: remove them from the text, such as with re.sub(r'<\|.*?\|>', '', text)"
        )
    return ids
