"""Labels of a transcript."""

from __future__ import annotations

from typing import Any

from ..languages import language_code

# The decoder of every Whisper has this many positions.
MAX_LABEL_LENGTH = 448


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
        ValueError: an unknown language or task, or one that the tokenizer has no token for.
    """
    if task not in ("transcribe", "translate"):
        raise ValueError(f"task {task!r} is unknown: expected 'transcribe' or 'translate'")
    prompt = [f"<|{language_code(language)}|>", f"<|{task}|>", "<|notimestamps|>"]
    prompt_ids = tokenizer.convert_tokens_to_ids(prompt)
    for token, token_id in zip(prompt, prompt_ids, strict=True):
        # Whisper's unknown token is <|endoftext|>, so a missing token would end the labels silently.
        if token_id is None or token_id == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no token {token}: use a multilingual Whisper that knows it")
    text_ids = tokenizer(" " + text.strip(), add_special_tokens=False).input_ids
    return [*prompt_ids, *text_ids, tokenizer.eos_token_id]
