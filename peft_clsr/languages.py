"""Names of Whisper's languages."""

from __future__ import annotations

import difflib

from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE


def language_code(language: str) -> str:
    """
    The code by which Whisper knows a language.

    Args:
        language (`str`): A code ("ca"), an English name ("catalan", "Catalan") or a language token ("<|ca|>").

    Returns:
        `str`: The code, "ca".

    Raises:
        ValueError: Whisper has no such language; the message names the nearest one.

    Example:

    ```py
    >>> language_code("Catalan")
    'ca'
    ```
    """
    key = language.lower().removeprefix("<|").removesuffix("|>") if isinstance(language, str) else None
    if key in LANGUAGES:
        return key
    if key in TO_LANGUAGE_CODE:
        return TO_LANGUAGE_CODE[key]
    near = difflib.get_close_matches(key or "", TO_LANGUAGE_CODE, n=1, cutoff=0.7)
    hint = (
        f"did you mean {near[0]!r} ({TO_LANGUAGE_CODE[near[0]]})?"
        if near
        else "expected one of its codes or English names, such as 'ca' or 'catalan' (for a language that Whisper does "
        "not know, take the code of a related one)"
    )
    raise ValueError(f"language {language!r} is not a Whisper language; {hint}")
