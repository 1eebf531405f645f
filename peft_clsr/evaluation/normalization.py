"""Text as error rates compare it: without case and punctuation, words whole in every script."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

# Languages that put no spaces between words. Tibetan separates syllables, and Khmer may have invisible breaks.
UNSPACED_LANGUAGES = frozenset({"zh", "yue", "cmn", "ja", "th", "lo", "my", "km", "bo"})
_DOTTED_I = frozenset({"tr", "az"})
# Here an apostrophe is a letter that may begin or end a word: Hawaiian ʻokina, Uzbek togʻ, Maltese ta'.
_LETTER_APOSTROPHES = frozenset({"haw", "uz", "mt"})

# What keyboards and fonts offer for the apostrophe: quotation marks, modifier letters, accents, primes, geresh.
_APOSTROPHES = dict.fromkeys(
    map(ord, "\u2018\u2019\u201b\u02bb\u02bc\u02bd\u02b9\u2032\u0060\u00b4\u055a\u05f3\ua78c\uff07"), "'"
)
_MIDDLE_DOTS = dict.fromkeys(map(ord, "\u2022\u2027\u2219\u22c5"), "\u00b7")  # Catalan col·laborar
_BRACKETS = str.maketrans("（）［］＜＞", "()[]<>")
_DROPPED = dict.fromkeys(
    [
        *map(ord, "\u055b\u055c\u055e"),  # Armenian marks of stress and tone, written over a vowel within its word
        0x0640,  # Arabic tatweel, which only stretches a word
        0x034F,  # combining grapheme joiner
        *range(0xFE00, 0xFE10),  # variation selectors
        *range(0xE0100, 0xE01F0),
        *range(0x180B, 0x180E),
        *map(ord, "\u115f\u1160\u3164\uffa0"),  # Hangul fillers
    ]
)
# Malayalam chillus have two spellings: letter, virama and joiner, and a letter of their own.
_CHILLUS = re.compile("([\u0d15\u0d23\u0d28\u0d30\u0d32\u0d33])\u0d4d\u200d")
_CHILLU_OF = dict(zip("\u0d15\u0d23\u0d28\u0d30\u0d32\u0d33", "\u0d7f\u0d7a\u0d7b\u0d7c\u0d7d\u0d7e", strict=True))
_REPLACED = {**_APOSTROPHES, **_MIDDLE_DOTS, **_DROPPED}
_GERSHAYIM = re.compile(r"(?<=[\u05d0-\u05ea])[\"\u05f4\u201d](?=[\u05d0-\u05ea])")
_NOT_SPOKEN = re.compile(r"[<\[][^>\]]*[>\]]|\([^)]+?\)")
_JOINERS = "\u200c\u200d"
_WITHIN_WORDS = "'\u00b7\u05f4"


def rate_to_read(language: str) -> Literal["wer", "cer"]:
    """The error rate that says most about a language, by its code or tag: "cer" if it puts no spaces between words."""
    return "cer" if _primary(language) in UNSPACED_LANGUAGES else "wer"


def normalize_text(text: str, language: str = "") -> str:
    """
    Normalize a text for error rates.

    - Case goes, as the language folds it: in Turkish and Azerbaijani "I" is "ı".
    - Punctuation and symbols become spaces, text in brackets goes. Apostrophes of all kinds are one, and stay within
      words, as do the middle dot and Hebrew gershayim.
    - Marks stay: vowel signs, tones, niqqud, harakat.
    - Invisible characters go. Joiners (ZWJ, ZWNJ) stay in scripts without case, where they spell.
    - Compatibility forms become plain ones (NFKC), such as full-width letters.
    - In languages without spaces between words, all spaces go.

    Args:
        text (`str`): A transcript.
        language (`str`, *optional*): Code or tag. By default, the general rules.

    Returns:
        `str`: the words, with one space between them.

    Example:

    ```py
    >>> normalize_text("Сім’я — [шум] моя!", "uk")
    "сім'я моя"
    ```
    """
    primary = _primary(language)
    text = text.translate(_BRACKETS).translate(_REPLACED)  # before NFKC, which makes a space and a mark of "´"
    text = unicodedata.normalize("NFKC", _NOT_SPOKEN.sub("", text)).translate(_REPLACED)
    if primary in _DOTTED_I:
        text = text.replace("İ", "i").replace("I", "ı")
    text = unicodedata.normalize("NFC", text.lower().replace("i\u0307", "i"))
    text = _CHILLUS.sub(lambda match: _CHILLU_OF[match[1]], _GERSHAYIM.sub("\u05f4", text))
    kept = text if text.isascii() and text.isalnum() else _keep_words(text, primary in _LETTER_APOSTROPHES)
    return kept.replace(" ", "") if primary in UNSPACED_LANGUAGES else " ".join(kept.split())


def _primary(language: str) -> str:
    return re.split(r"[-_]", language.lower(), maxsplit=1)[0]


def _keep_words(text: str, apostrophes_are_letters: bool) -> str:
    """Letters, digits and marks, and what stands within words; a space for anything else."""
    kept: list[str] = []
    in_word, is_caseless = False, False  # about the last kept character
    for position, character in enumerate(text):
        category = unicodedata.category(character)
        if category[0] in "LN":
            kept.append(character)
            in_word, is_caseless = True, category == "Lo"
        elif category[0] == "M":
            if in_word and category != "Me":  # a mark alone is what is left of a symbol
                kept.append(character)
        elif category == "Cf":
            if character in _JOINERS and in_word and is_caseless and _starts_letter(text, position + 1):
                kept.append(character)
        elif category[0] in "PSZ" or character.isspace():
            if character in _WITHIN_WORDS and (
                (in_word and _starts_letter(text, position + 1))
                or (character == "'" and apostrophes_are_letters and (in_word or _starts_letter(text, position + 1)))
            ):
                kept.append(character)
            else:
                kept.append(" ")
                in_word = False
        elif category != "Cc":
            kept.append(character)  # private use and unassigned: perhaps a letter of a newer Unicode
            in_word, is_caseless = True, False
    return "".join(kept)


def _starts_letter(text: str, position: int) -> bool:
    """True if a letter, digit or mark follows, after invisible characters."""
    for character in text[position:]:
        category = unicodedata.category(character)
        if category != "Cf":
            return category[0] in "LNM"
    return False
