"""Names of Whisper's languages, and the adapter for a language."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from langcodes import Language, LanguageTagError
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE


def language_code(language: str) -> str:
    """
    Return Whisper's code of a language.

    Args:
        language (`str`):
            A code ("ca"), an English name ("catalan", "Catalan") or a language token ("<|ca|>"). Or a tag in any case,
            with "-" or "_", as FLEURS ("ca_es", "cmn_hans_cn"), Common Voice ("zh-CN") and ISO 639-2 and 639-3
            ("cat", "rum") write it. Region, script and variant are ignored: "pt-BR" is "pt".

    Returns:
        `str`: The code, "ca".

    Raises:
        ValueError: Whisper has no such language. The message names the most similar one.

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
    """Whisper's code of a language, or `None`."""
    key = _key(language)
    if key in LANGUAGES:
        return key
    return TO_LANGUAGE_CODE.get(key) or _CODES.get(_language_of_tag(key))


def _language_of_tag(tag: str) -> str | None:
    """CLDR's language of a tag: "ca" for "ca_es" and "cat", "jv" for "jw"; `None` if it is no tag."""
    try:
        parsed = Language.get(tag).prefer_macrolanguage()
    except (LanguageTagError, RecursionError):  # RecursionError: a tag with a thousand parts
        return None
    # Otherwise "my-model" and "my-new" would be Burmese, with a variant "model" and an extended language "new".
    if not parsed.is_valid() or parsed.extlangs or parsed.extensions or parsed.private:
        return None
    return parsed.language


# Whisper's "no" is Bokmål (it has "nn" for Nynorsk). CLDR separates Bokmål, "nb", from Norwegian, "no".
_CODES = {_language_of_tag(code): code for code in LANGUAGES} | {"nb": "no"}


def adapter_of_language(adapters: Mapping[str, Any], language: str) -> str:
    """
    Return the adapter that trains on a language: the one of that name, or the only one for that language.

    An adapter is for its config's `language`, else for the language that its name says (see [`language_code`]). A
    single adapter that is for no language in particular (such as "default") takes all.

    Args:
        adapters (`Mapping[str, CLSRConfig]`): A model's `peft_config`.
        language (`str`): An adapter's name, or a language as in [`language_code`].

    Returns:
        `str`: the adapter's name.

    Raises:
        ValueError: no adapter is for the language, or several are.

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
    languages = adapter_languages(adapters)
    names = [name for name in adapters if languages[name] == code]
    if not names and len(adapters) == 1:
        names = [name for name in adapters if languages[name] is None]
    if len(names) != 1:
        has = "several adapters" if names else "no adapter"
        raise ValueError(
            f"language {language!r} has {has} on the model (adapters: {', '.join(names or adapters)}): add one with "
            f"model.add_adapter({code!r}, CLSRConfig(language={code!r})), or leave the language out of the dataset"
        )
    return names[0]


def inference_adapter(adapters: Mapping[str, Any], language: str, active: str | None) -> str | None:
    """
    Return the adapter that inference uses for a sample of a language.

    It is the active adapter if that is for the language; else the one of that name; else the only one for that
    language (see [`adapter_of_language`]); else the active adapter if it is for no language in particular.

    Args:
        adapters (`Mapping[str, CLSRConfig]`): A model's `peft_config`.
        language (`str`): Whisper's code, or the code of a token that the user added: "xx" for "<|xx|>".
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
    languages = adapter_languages(adapters)
    if active is not None and languages[active] == language:
        return active
    if language in adapters:
        return language
    names = [name for name in adapters if languages[name] == language]
    if len(names) > 1:
        raise ValueError(
            f"language {language!r} has several adapters on the model ({', '.join(names)}), none of them active: "
            f"choose one with model.set_adapter({names[0]!r})"
        )
    if names:
        return names[0]
    return active if active is not None and languages[active] is None else None


def adapter_languages(adapters: Mapping[str, Any]) -> dict[str, str | None]:
    """The language of each adapter, or `None` for no language in particular."""
    return {name: config.language or _find_code(name) for name, config in adapters.items()}
