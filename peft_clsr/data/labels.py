"""Labels of a transcript."""

from __future__ import annotations

import re
from typing import Any

from ..languages import language_code

# The decoder of every published Whisper has this many positions; the config of another says max_target_positions.
MAX_LABEL_LENGTH = 448

_SPECIAL_TOKEN = re.compile(r"<\|[^<>|]*\|>")


def encode_labels(tokenizer: Any, text: str, language: str, task: str = "transcribe") -> list[int]:
    """
    Encode a transcript as labels: `<|language|><|task|><|notimestamps|> text<|endoftext|>`.

    The text gets one leading space, as in OpenAI's training data (" word" and "word" are different tokens).
    `<|startoftranscript|>` is left out: the model adds it when it shifts the labels right.

    Args:
        tokenizer (`WhisperTokenizer`): A multilingual Whisper tokenizer.
        text (`str`): The transcript.
        language (`str`): Name or code, "catalan" or "ca".
        task (`str`, *optional*, defaults to `"transcribe"`): "transcribe" or "translate".

    Returns:
        `list[int]`: token ids.

    Raises:
        ValueError: an unknown language or task, or one that the tokenizer has no token for; a text with special
            tokens, see [`check_transcript`].
    """
    if task not in ("transcribe", "translate"):
        raise ValueError(f"task {task!r} is unknown: expected 'transcribe' or 'translate'")
    prompt = [f"<|{language_code(language)}|>", f"<|{task}|>", "<|notimestamps|>"]
    prompt_ids = tokenizer.convert_tokens_to_ids(prompt)
    for token, token_id in zip(prompt, prompt_ids, strict=True):
        # Whisper's unknown token is <|endoftext|>, so a missing token would end the labels silently.
        if token_id is None or token_id == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no token {token}: use a multilingual Whisper that knows it")
    return [*prompt_ids, *check_transcript(tokenizer, text), tokenizer.eos_token_id]


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
