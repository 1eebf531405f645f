"""The adapter that is for a language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .tags import are_equal_tags, closest_tags, language_tag, whisper_code


def adapter_of_language(adapters: Mapping[str, Any], language: str) -> str:
    """
    Return the adapter that trains on a language: the one of that name, or the only one for that language.

    An adapter is for its config's `language`, else for the Whisper language that its name says. The language itself
    wins over a broader one: a row of "ca-valencia" takes the adapter "ca" if there is none for "ca-valencia". A
    single adapter that is for no language in particular (such as "default") takes all.

    Args:
        adapters (`Mapping[str, CLSRConfig]`): A model's `peft_config`.
        language (`str`): An adapter's name, or a language as in [`language_tag`].

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
    tag = language_tag(language)
    if tag in adapters:
        return tag
    names = _adapters_for(adapters, tag)
    if not names and len(adapters) == 1 and [*adapter_languages(adapters).values()] == [None]:
        names = list(adapters)
    if len(names) != 1:
        has = "several adapters" if names else "no adapter"
        raise ValueError(
            f"language {language!r} has {has} on the model (adapters: {', '.join(names or adapters)}): add one with "
            f"model.add_adapter({tag!r}, CLSRConfig(language={tag!r})), or leave the language out of the dataset"
        )
    return names[0]


def inference_adapter(
    adapters: Mapping[str, Any], language: str, active: str | None, by_prompt_language: bool = False
) -> str | None:
    """
    Return the adapter that inference uses for a sample of a language.

    It is the active adapter if that is for the language; else the one of that name; else the only one for that
    language or, if there is none, for a broader one (see [`adapter_of_language`]); else the active adapter if it is
    for no language in particular.

    Args:
        adapters (`Mapping[str, CLSRConfig]`): A model's `peft_config`.
        language (`str`): A tag from [`language_tag`], or the code of a token that the user added: "xx" for "<|xx|>".
        active (`str`, *optional*): The name of the active adapter.
        by_prompt_language (`bool`, *optional*, defaults to `False`):
            If no adapter is for the language, take the only one with this `prompt_language`.

    Returns:
        `str`, *optional*: the adapter's name; `None` for the base model.

    Raises:
        ValueError: several adapters are for the language, and none of them is active or named by its tag.

    Example:

    ```py
    >>> adapters = {"mine": CLSRConfig(language="ca"), "uk": CLSRConfig()}
    >>> inference_adapter(adapters, "ca", active="uk")
    'mine'
    >>> inference_adapter(adapters, "ro", active="uk") is None
    True
    ```
    """
    names = _adapters_for(adapters, language)
    if active in names:
        return active
    if language in names or (language in adapters and not names):
        return language
    if len(names) > 1:
        raise ValueError(
            f"language {language!r} has several adapters on the model ({', '.join(names)}), none of them active: "
            f"choose one with model.set_adapter({names[0]!r})"
        )
    if names:
        return names[0]
    if by_prompt_language:
        names = adapters_with_prompt(adapters, language)
        if len(names) == 1:
            return names[0]
    return active if active is not None and adapter_languages(adapters)[active] is None else None


def adapter_languages(adapters: Mapping[str, Any]) -> dict[str, str | None]:
    """The language of each adapter, or `None` for no language in particular."""
    return {
        name: config.language or (None if whisper_code(name) is None else language_tag(name))
        for name, config in adapters.items()
    }


def adapter_prompts(adapters: Mapping[str, Any]) -> dict[str, str | None]:
    """Whisper's code of the language in each adapter's prompt, or `None` for no language in particular."""
    return {name: config.prompt_language or whisper_code(name) for name, config in adapters.items()}


def adapters_with_prompt(adapters: Mapping[str, Any], code: str) -> list[str]:
    """The adapters whose prompt has the token of a Whisper language."""
    return [name for name, prompt in adapter_prompts(adapters).items() if prompt == code]


def is_for_broader_language(adapters: Mapping[str, Any], name: str, language: str) -> bool:
    """True if an adapter is for a broader language than this one: for "ca", where it is "ca-valencia"."""
    own = adapter_languages(adapters)[name]
    if own is None or name == language:
        return False
    try:
        return not are_equal_tags(own, language_tag(language))
    except ValueError:  # a token that the user added to Whisper
        return False


def _adapters_for(adapters: Mapping[str, Any], tag: str) -> list[str]:
    """The adapters for a language, else for a broader one."""
    languages = adapter_languages(adapters)
    closest = closest_tags(tag, [language for language in languages.values() if language is not None])
    return [name for name, language in languages.items() if language in closest]
