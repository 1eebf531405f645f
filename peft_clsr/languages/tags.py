"""Names of languages: the tags of adapters, and Whisper's codes for its prompts."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import langcodes
from langcodes import Language, LanguageTagError
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from .groups import related_languages


def language_code(language: str) -> str:
    """
    Return Whisper's code of a language.

    Args:
        language (`str`):
            A code ("ca"), an English name ("catalan", "Catalan") or a language token ("<|ca|>"). Or a tag in any case,
            with "-" or "_", as FLEURS ("ca_es", "cmn_hans_cn"), Common Voice ("zh-CN") and ISO 639-2 and 639-3
            ("cat", "rum") write it, or its own name ("català"). Region, script and variant are ignored: "pt-BR" is
            "pt".

    Returns:
        `str`: The code, "ca".

    Raises:
        ValueError: Whisper has no such language. The message names the most similar one, or related ones.

    Example:

    ```py
    >>> language_code("Catalan")
    'ca'
    >>> language_code("jv_id")
    'jw'
    ```
    """
    code = whisper_code(language) or whisper_code(_tag_of_name(_key(language)))
    if code is not None:
        return code
    near = difflib.get_close_matches(_key(language), TO_LANGUAGE_CODE, n=1, cutoff=0.7)
    try:
        tag = None if near else language_tag(language)
    except ValueError:
        tag = None
    if near:
        hint = f"did you mean {near[0]!r} ({TO_LANGUAGE_CODE[near[0]]})?"
    elif tag is not None:
        hint = f"to train an expert for it, {_prompt_hint(tag)}"
    else:
        hint = "expected one of its codes or English names, such as 'ca' or 'catalan'"
    raise ValueError(f"language {language!r} is not a Whisper language; {hint}")


def language_tag(language: str) -> str:
    """
    Return the standard tag of a language or dialect, which need not be one of Whisper's.

    Args:
        language (`str`):
            A BCP 47 tag in any case, with "-" or "_" ("rw", "gsw-CH", "ca_valencia", "sr-Latn"), or what
            [`language_code`] takes, or another name that CLDR knows, in English or in the language ("Kinyarwanda",
            "română").

    Returns:
        `str`: The tag, standardized by langcodes. A language without region, script or variant that Whisper knows gets
        Whisper's code: "cat" is "ca", "jv" is "jw".

    Raises:
        ValueError: it is neither a tag nor a name.

    Example:

    ```py
    >>> language_tag("CA-Valencia")
    'ca-valencia'
    >>> language_tag("Kinyarwanda")
    'rw'
    ```
    """
    key = _key(language)
    code = TO_LANGUAGE_CODE.get(key, key)
    if code in LANGUAGES:
        return code
    tag = _standard_tag(key) or _tag_of_name(key)
    if tag is None:
        near = difflib.get_close_matches(key, TO_LANGUAGE_CODE, n=1, cutoff=0.7)
        hint = f"; did you mean {near[0]!r} ({TO_LANGUAGE_CODE[near[0]]})?" if near else ""
        raise ValueError(
            f"language {language!r} is neither a language tag (BCP 47) nor a name: expected one such as "
            f"'ca', 'catalan', 'rw', 'gsw-CH' or 'ca-valencia'{hint}"
        )
    return tag


def whisper_code(language: Any) -> str | None:
    """Whisper's code of a language as in [`language_code`]; `None` if Whisper does not know it."""
    key = _key(language)
    if key in LANGUAGES:
        return key
    return TO_LANGUAGE_CODE.get(key) or _CODES.get(_language_of_tag(key))


def prompt_code(language: str, prompt_language: str | Mapping[str, str] | None = None) -> str:
    """
    Return the code of the Whisper language whose token stands in the prompt of a language.

    Args:
        language (`str`): As in [`language_tag`].
        prompt_language (`str` or `Mapping[str, str]`, *optional*):
            A Whisper language, or one for each of some languages: {"rw": "sw"}. By default Whisper's own.

    Raises:
        ValueError: `language` or `prompt_language` is unknown; Whisper has no language of its own, and none is given.
    """
    if isinstance(prompt_language, Mapping):
        given = {language_tag(name): prompt for name, prompt in prompt_language.items()}
        prompt_language = given.get(language_tag(language))
    if prompt_language is not None:
        return language_code(prompt_language)
    tag = language_tag(language)
    code = own_prompt_code(tag)
    if code is None:
        raise ValueError(f"Whisper has no language {tag!r}: {_prompt_hint(tag)}")
    return code


def own_prompt_code(tag: str) -> str | None:
    """Whisper's code of the language of a tag, "ca" for "ca-valencia" and "ca-x-rural"; `None` if it has none."""
    return whisper_code(tag.partition("-x-")[0])  # a name such as "my-x-model" is no language, but a tag is one


def language_name(tag: str) -> str:
    """The English name of a language, "Catalan" or "Swiss German (Switzerland)"; the tag itself, if it has no name."""
    if tag in LANGUAGES:
        return LANGUAGES[tag].title()
    language = Language.get(tag)
    # CLDR names no variants: "ca-valencia" would be "Catalan".
    return ", ".join([language.display_name(), *(language.variants or ())])


def closest_tags(language: str, tags: Iterable[str]) -> list[str]:
    """
    Return those of some tags that are for a language: the tag itself, else equal ones, else broader ones.

    Equal are tags that differ in what goes without saying: "ca-ES" and "ca" (CLDR's likely subtags). "ca" is broader
    than "ca-valencia".

    Args:
        language (`str`): A tag from [`language_tag`].
        tags (`Iterable[str]`): Tags.

    Returns:
        `list[str]`: all that are equally close; empty if none is for the language.
    """
    tags = list(tags)
    for wide in _broader_tags(language):
        exact = [tag for tag in tags if tag == wide]
        # "pt-BR" is equal to "pt", but not broader than "pt-PT".
        found = exact or [tag for tag in tags if are_equal_tags(wide, tag) and _is_whole_of(tag, language)]
        if found:
            return found
    return []


@functools.lru_cache(4096)
def are_equal_tags(one: str, other: str) -> bool:
    """True if two tags differ at most in what goes without saying: "ca-ES" and "ca", "zh-CN" and "zh"."""
    return one == other or Language.get(one).maximize() == Language.get(other).maximize()


@functools.lru_cache(4096)
def _is_whole_of(whole: str, part: str) -> bool:
    """True if nothing about a tag contradicts another one, when all that goes without saying is said."""
    one, other = Language.get(whole).maximize(), Language.get(part).maximize()
    are_alike = (one.script, one.territory) == (other.script, other.territory)
    return are_alike and set(one.variants or ()) <= set(other.variants or ())


@functools.lru_cache(1024)
def _broader_tags(tag: str) -> tuple[str, ...]:
    """The tag, and those of which it is a part: "sr-Latn-RS", "sr-Latn", "sr"."""
    if _standard_tag(tag.lower()) is None:
        return (tag,)  # a token that the user added to Whisper
    broader = (wide for wide in Language.get(tag).broader_tags() if not wide.startswith("und"))
    return tuple(dict.fromkeys([tag, *(_with_whispers_code(wide) for wide in broader)]))


def _prompt_hint(tag: str) -> str:
    """Says how to give a prompt language, and names candidates."""
    related = related_languages(tag)
    first = related[0] if related else "sw"
    names = ", ".join(f"{code} ({LANGUAGES[code]})" for code in related)
    candidates = f"; related ones are {names}" if names else ""
    return (
        f"name the Whisper language whose token stands in the prompt, such as prompt_language={first!r} "
        f"(--prompt_language {first}); one that sounds similar is a good choice{candidates}"
    )


def _key(language: Any) -> str:
    return language.lower().removeprefix("<|").removesuffix("|>") if isinstance(language, str) else ""


def _parse(tag: str) -> Language | None:
    """The parts of a valid tag."""
    try:
        parsed = Language.get(tag)
    except (LanguageTagError, RecursionError):  # RecursionError: a tag with a thousand parts
        return None
    # Otherwise "my-model" and "my-new" would be Burmese, with a variant "model" and an extended language "new".
    is_valid = parsed.language and parsed.is_valid() and not parsed.extlangs and not parsed.extensions
    return parsed if is_valid else None


def _language_of_tag(tag: str) -> str | None:
    """CLDR's language of a tag: "ca" for "ca_es" and "cat", "jv" for "jw"; `None` if it is no tag."""
    parsed = _parse(tag)
    return None if parsed is None or parsed.private else parsed.prefer_macrolanguage().language


@functools.lru_cache(1024)
def _standard_tag(key: str) -> str | None:
    parsed = _parse(key)
    if parsed is None or parsed.language in ("mul", "und", "zxx"):
        return None
    return _with_whispers_code(str(parsed.prefer_macrolanguage()))


def _with_whispers_code(tag: str) -> str:
    return _CODES.get(tag, tag)


def _tag_of_name(key: str) -> str | None:
    """The tag of a name that CLDR knows, in English or in the language itself."""
    if len(key) < 4:
        return None
    for names in ("en", None):
        try:
            found = langcodes.find(key, language=names)
        except LookupError:
            continue
        # langcodes guesses: "romanain" would be Balkan Romani.
        if key in (found.display_name().lower(), found.autonym().lower()):
            return _standard_tag(str(found))
    return None


# Whisper's "no" is Bokmål (it has "nn" for Nynorsk). CLDR separates Bokmål, "nb", from Norwegian, "no".
_CODES = {_language_of_tag(code): code for code in LANGUAGES} | {"nb": "no"}
