"""Names of Whisper's languages, and the adapters that are for them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from langcodes import Language, LanguageTagError
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE


def language_code(language: str) -> str:
    """
    The code by which Whisper knows a language.

    Args:
        language (`str`):
            A code ("ca"), an English name ("catalan", "Catalan") or a language token ("<|ca|>"). Or a tag as data sets
            write it, in any case, with "-" or "_": of FLEURS ("ca_es", "cmn_hans_cn"), of Common Voice ("zh-CN"), of
            ISO 639-2 or 639-3 ("cat", "rum"). Its region, script and variant do not count: "pt-BR" is "pt".

    Returns:
        `str`: The code, "ca".

    Raises:
        ValueError: Whisper has no such language; the message names the nearest one.

    Example:

    ```py
    >>> language_code("Catalan")
    'ca'
    >>> language_code("jv_id")
    'jw'
    ```
    """
    code = _find_code(language)
    if code is not None:
        return code
    near = difflib.get_close_matches(_key(language), TO_LANGUAGE_CODE, n=1, cutoff=0.7)
    hint = (
        f"did you mean {near[0]!r} ({TO_LANGUAGE_CODE[near[0]]})?"
        if near
        else "expected one of its codes or English names, such as 'ca' or 'catalan' (for a language that Whisper does "
        "not know, take the code of a related one)"
    )
    raise ValueError(f"language {language!r} is not a Whisper language; {hint}")


def _key(language: Any) -> str:
    return language.lower().removeprefix("<|").removesuffix("|>") if isinstance(language, str) else ""


def _find_code(language: Any) -> str | None:
    """Whisper's code for a language, or `None`."""
    key = _key(language)
    if key in LANGUAGES:
        return key
    return TO_LANGUAGE_CODE.get(key) or _CODES.get(_language_of_tag(key))


def _language_of_tag(tag: str) -> str | None:
    """The language of a tag as CLDR writes it: "ca" of "ca_es" and "cat", "jv" of "jw"; `None` of what is no tag."""
    try:
        parsed = Language.get(tag).prefer_macrolanguage()
    except (LanguageTagError, RecursionError):  # the latter of a tag with a thousand parts
        return None
    # By their form alone, "my-model" and "my-new" are Burmese: with a variant "model", an extended language "new".
    if not parsed.is_valid() or parsed.extlangs or parsed.extensions or parsed.private:
        return None
    return parsed.language


# CLDR keeps Bokmål, "nb", apart from Norwegian, "no", by which Whisper means Bokmål: it has "nn" for Nynorsk.
_CODES = {_language_of_tag(code): code for code in LANGUAGES} | {"nb": "no"}


def adapter_of_language(adapters: Mapping[str, Any], language: str) -> str:
    """
    The adapter that is for a language in training: the one of that name, or the only one whose own language it is.

    An adapter's own language is its config's `language`, else what [`language_code`] makes of its name. A single
    adapter that is for no language in particular (such as "default") takes all.

    Args:
        adapters (`Mapping[str, CLSRConfig]`): A model's `peft_config`.
        language (`str`): An adapter's name, or a language as [`language_code`] takes it.

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
    own = _own_languages(adapters)
    names = [name for name in adapters if own[name] == code]
    if not names and len(adapters) == 1:
        names = [name for name in adapters if own[name] is None]
    if len(names) != 1:
        has = "several adapters" if names else "no adapter"
        raise ValueError(
            f"language {language!r} has {has} on the model (adapters: {', '.join(names or adapters)}): add one with "
            f"model.add_adapter({code!r}, CLSRConfig(language={code!r})), or leave the language out of the dataset"
        )
    return names[0]


def inference_adapter(adapters: Mapping[str, Any], language: str, active: str | None) -> str | None:
    """
    The adapter by which inference routes a sample of a language.

    It is the active adapter if that is for the language; else the one of that name; else the only one whose own
    language it is (see [`adapter_of_language`]); else the active adapter if it is for no language in particular.

    Args:
        adapters (`Mapping[str, CLSRConfig]`): A model's `peft_config`.
        language (`str`): Whisper's code, or that of a token which the user added to the vocabulary: "xx" of "<|xx|>".
        active (`str`, *optional*): The name of the active adapter.

    Returns:
        `str`, *optional*: the adapter's name; `None` for the base model.

    Raises:
        ValueError: several adapters are for the language, and none of them is active or named by its code.

    Example:

    ```py
    >>> adapters = {"mine": CLSRConfig(language="ca"), "uk": CLSRConfig()}
    >>> inference_adapter(adapters, "ca", active="uk")
    'mine'
    >>> inference_adapter(adapters, "ro", active="uk") is None
    True
    ```
    """
    own = _own_languages(adapters)
    if active is not None and own[active] == language:
        return active
    if language in adapters:
        return language
    names = [name for name in adapters if own[name] == language]
    if len(names) > 1:
        raise ValueError(
            f"language {language!r} has several adapters on the model ({', '.join(names)}), none of them active: "
            f"choose one with model.set_adapter({names[0]!r})"
        )
    if names:
        return names[0]
    return active if active is not None and own[active] is None else None


def _own_languages(adapters: Mapping[str, Any]) -> dict[str, str | None]:
    """The language that each adapter is for; `None` for no language in particular."""
    return {name: config.language or _find_code(name) for name, config in adapters.items()}
