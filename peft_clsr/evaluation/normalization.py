"""
Texts as they are scored: case, punctuation and invisible characters do not count, words stay whole in every script.

transformers' `BasicTextNormalizer` replaces combining marks by spaces, which takes away the vowels of Indic and Thai
words. `whisper-normalizer` can keep them, but splits words at apostrophes and at invisible characters.
"""

from __future__ import annotations

import functools
import unicodedata
from typing import Literal

import regex
from langcodes import Language, LanguageTagError

from ..languages.tags import language_tag, own_prompt_code

# Scripts that put no spaces between words: Chinese, Japanese, Thai, Lao, Burmese, Khmer, Tibetan.
_SPACELESS_SCRIPTS = {"Hani", "Hans", "Hant", "Jpan", "Thai", "Laoo", "Mymr", "Khmr", "Tibt"}
_DOTTED_I = {"az", "crh", "gag", "tr"}  # İ is the upper case of i there, and I of ı
# An apostrophe stands between two words there: "l'home" is article and noun.
_ELISION = {"ca", "el", "fr", "it", "lb", "oc", "pt"}

_JOINERS = "\u200c\u200d"
_LETTER = r"[\p{L}\p{M}]"
# Words that Unicode counts as symbols or punctuation: Sindhi "and" and "in", Burmese particles.
_SYMBOL_WORDS = "\u06fd\u06fe\u104c-\u104f"

_BRACKETS = regex.compile(r"[<\[\uff1c\uff3b][^>\]\uff1e\uff3d]*[>\]\uff1e\uff3d]|[(\uff08][^)\uff09]+[)\uff09]")
# Signs that people type for an apostrophe, or for the letter that looks like one.
_APOSTROPHES = (
    "\u0060\u00b4\u02b9\u02bb\u02bc\u02bd\u02be\u02bf\u02c8\u02ca\u02cb\u055a\u05f3\u07f4\u07f5\u1fbd"
    "\u1fbf\u1fef\u1ffd\u1ffe\u2018\u2019\u201b\u2032\u2035\ua78b\ua78c\uff07\uff40"
)
# Also dropped: Arabic's stretching bar, Armenian's marks over a stressed vowel, marks that enclose a character.
_INVISIBLE = regex.compile(
    r"[[\p{Default_Ignorable_Code_Point}\p{Cf}\p{Me}\u0640\u055b\u055c\u055e\u055f]--[\u200c\u200d]]|(?=\S)\p{Cc}",
    regex.V1,
)


class _Signs(dict[int, str | int | None]):
    """For `str.translate`: apostrophes become one, invisible characters are dropped. Looks each character up once."""

    def __missing__(self, code: int) -> int | None:
        self[code] = kept = None if _INVISIBLE.match(chr(code)) else code
        return kept


_SIGNS = _Signs({**dict.fromkeys(map(ord, _APOSTROPHES), "'"), 0x149: "'n"})  # NFKC would make U+02BC of U+0149

# Joiners change the shape beside a virama, and ZWNJ between letters that would join (RFC 5892, appendix A).
_VIRAMA = r"\p{Canonical_Combining_Class=Virama}"
_SILENT_JOINER = regex.compile(
    rf"(?<!{_VIRAMA})(?<![\p{{Joining_Type=L}}\p{{Joining_Type=D}}]\p{{Joining_Type=T}}*)\u200c"
    rf"|\u200c(?<!{_VIRAMA}.)(?!\p{{Joining_Type=T}}*[\p{{Joining_Type=R}}\p{{Joining_Type=D}}])"
    rf"|(?<!{_VIRAMA})\u200d(?!{_VIRAMA})|[{_JOINERS}](?!{_LETTER})"
)
_REPEATED_JOINERS = regex.compile(f"[{_JOINERS}]+(?=[{_JOINERS}])")
# Letters that old texts spell with ZWJ: the Malayalam chillus and the Bengali khanda ta.
_JOINED_LETTERS = {
    "ണ്\u200d": "ൺ",
    "ന്\u200d": "ൻ",
    "ര്\u200d": "ർ",
    "ല്\u200d": "ൽ",
    "ള്\u200d": "ൾ",
    "ക്\u200d": "ൿ",
    "ত্\u200d": "ৎ",
}
# NFKC takes Thai's and Lao's vowel "am" apart, and people type the tone mark on either side of its ring.
_AM = {
    "\u0e33": regex.compile("\u0e4d([\u0e48-\u0e4b]?)\u0e32"),
    "\u0eb3": regex.compile("\u0ecd([\u0ec8-\u0ecb]?)\u0eb2"),
}
_SOFT_DOT = regex.compile("(?<=[ijį])\u0307+")  # "İ".lower() is "i" and a dot above
_GERSHAYIM = regex.compile(r"(?<=\p{Hebrew})[\"“”״](?=\p{Hebrew})")  # in acronyms
# NFKC makes a space and a mark of "¨".
_STRAY_MARKS = regex.compile(rf"(?<![\p{{L}}\p{{M}}\p{{N}}{_JOINERS}'])\p{{M}}[\p{{M}}{_JOINERS}]*")
_QUOTED_WORD = regex.compile(r"(?<![\w'])'([^\s']+)'(?![\w'])")


def leading_rate(language: str) -> Literal["wer", "cer"]:
    """
    The error rate to read for a language: "cer" if it puts no spaces between words, else "wer".

    Args:
        language (`str`): As in [`language_tag`]. The script counts: "zh-Latn" has spaces.
    """
    return "cer" if _script(_tag(language)) in _SPACELESS_SCRIPTS else "wer"


def normalize_text(text: str, language: str) -> str:
    """
    Normalize a transcript for scoring.

    - Compatible characters become equal (NFKC), and case is folded as the language does. Marks stay.
    - What stands in brackets is dropped. Punctuation and symbols become spaces.
    - Apostrophes become one, and stay inside words, where they are letters or contract a word. At a word's edge they
      are quotation marks, but for languages where they are letters there. In languages of elision ("l'home") they are
      spaces.
    - Invisible characters are dropped. ZWJ and ZWNJ stay where they change the shape of a word.
    - In languages without spaces between words, all spaces are dropped.

    Args:
        text (`str`): The transcript.
        language (`str`):
            As in [`language_tag`]. A dialect has the rules of its language, an unknown language the general ones.

    Returns:
        `str`: words with single spaces between them; "" if there are none.
    """
    code = _subtag(language)
    spaceless = leading_rate(language) == "cer"
    if spaceless:
        text = "".join(text.split())
    text = _BRACKETS.sub("", text).translate(_SIGNS)
    text = unicodedata.normalize("NFKC", text)
    if "\u200c" in text or "\u200d" in text:
        for spelling, letter in _JOINED_LETTERS.items():
            text = text.replace(spelling, letter)
        text = _SILENT_JOINER.sub("", _REPEATED_JOINERS.sub("", text))
    text = _fold_case(text, code)
    if code in _EDGE_APOSTROPHES:
        text = _QUOTED_WORD.sub(r"\1", text)
    text = _STRAY_MARKS.sub(" ", _punctuation(code).sub(" ", _GERSHAYIM.sub("", text)))
    text = ("" if spaceless else " ").join(text.split())
    for am, parts in _AM.items():
        text = parts.sub(rf"\1{am}", text)
    return text


def _fold_case(text: str, code: str) -> str:
    if code in _DOTTED_I:
        text = text.replace("İ", "i").replace("I", "ı")
    text = text.lower()
    if "\u0307" in text:
        text = _SOFT_DOT.sub("", text)
    text = unicodedata.normalize("NFKC", text)  # lower case may compose with a mark where upper case does not
    if code == "hy":  # the capital of "և" is two letters
        text = text.replace("եւ", "և").replace("եվ", "և")
    if code == "ca":  # other dots that are typed in "col·lecció"
        text = regex.sub("(?<=l)[•‧∙⋅](?=l)", "·", text)
    return text


# No word ends here. A mark alone is no word: it becomes a space later.
_NO_WORD_BEFORE = rf"(?<![\p{{L}}\p{{N}}][\p{{M}}{_JOINERS}]*)"
# Apostrophes that are letters at a word's edge. The pattern is of those that are not.
_INSIDE = rf"{_NO_WORD_BEFORE}'|'(?!{_LETTER})"
_EDGE_APOSTROPHES = {
    "ha": rf"{_NO_WORD_BEFORE}'(?!y)|'(?!{_LETTER})",
    "haw": rf"'(?!{_LETTER})",
    "he": rf"{_NO_WORD_BEFORE}'|(?<![גזצץ])'(?!{_LETTER})",
    "mt": rf"{_NO_WORD_BEFORE}'",
    "uz": rf"{_NO_WORD_BEFORE}'|(?<![og])'(?!{_LETTER})",
}


@functools.cache
def _punctuation(code: str) -> regex.Pattern:
    """The pattern of what becomes a space."""
    apostrophe = "'" if code in _ELISION else _EDGE_APOSTROPHES.get(code, _INSIDE)
    middle_dot = "(?<!l)·|·(?!l)" if code == "ca" else "·"
    return regex.compile(rf"[[\p{{P}}\p{{S}}]--['·{_SYMBOL_WORDS}]]|{apostrophe}|{middle_dot}", regex.V1)


@functools.cache
def _subtag(language: str) -> str:
    """Whisper's code of a language, or the first part of a tag that Whisper does not know."""
    tag = _tag(language)
    return own_prompt_code(tag) or regex.split("[-_]", tag)[0]


@functools.cache
def _tag(language: str) -> str:
    """The standard tag of a language, or its name in lower case."""
    try:
        return language_tag(language)
    except ValueError:
        return language.lower()


@functools.cache
def _script(tag: str) -> str | None:
    """The script that a language is mostly written in, by the tag or by CLDR."""
    try:
        return Language.get(tag).maximize().script
    except LanguageTagError:
        return None
