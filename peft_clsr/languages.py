"""Names of Whisper's languages."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

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


def adapter_of_language(adapters: Mapping[str, Any], language: str) -> str:
    """
    The adapter that is for a language: the one of that name, or the one whose config has that `language`.

    A single adapter that is for no language in particular (such as "default") takes all.

    Args:
        adapters (`Mapping[str, CLSRConfig]`): A model's `peft_config`.
        language (`str`): An adapter's name, or a code, English name or token of a Whisper language.

    Returns:
        `str`: the adapter's name.

    Raises:
        ValueError: no adapter, or several, are for the language.

    Example:

    ```py
    >>> adapter_of_language({"uk": CLSRConfig(), "mine": CLSRConfig(language="ca")}, "Catalan")
    'mine'
    ```
    """
    if language in adapters:
        return language
    code = language_code(language)
    if code in adapters:
        return code
    names = [name for name, config in adapters.items() if config.language == code]
    if not names and len(adapters) == 1:
        names = [name for name, config in adapters.items() if config.language is None and name not in LANGUAGES]
    if len(names) != 1:
        has = "several adapters" if names else "no adapter"
        raise ValueError(
            f"language {language!r} has {has} on the model (adapters: {', '.join(names or adapters)}): add one with "
            f"model.add_adapter({code!r}, CLSRConfig(language={code!r})), or leave the language out of the dataset"
        )
    return names[0]
