"""Text of unknown encoding: UTF-8, UTF-16, or the Windows code page of the language."""

from __future__ import annotations

import codecs
import re
import unicodedata

# The code pages in which Windows, and so a spreadsheet's "CSV", writes a language. Guesses from the bytes alone are
# often wrong for short texts: Romanian in cp1250 reads as Portuguese in cp1252.
_LANGUAGES_OF_CODE_PAGES = {
    "cp1250": "bs cs hr hu pl ro sk sl sq sr",
    "cp1251": "ba be bg kk mk mn ru sr tg tt uk",
    "cp1252": "af br ca cy da de en es eu fi fo fr gl ht id is it jw lb la ms nl nn no oc pt sn so su sv sw tl",
    "cp1253": "el",
    "cp1254": "az tr uz",
    "cp1255": "he yi",
    "cp1256": "ar fa ur",
    "cp1257": "et lt lv",
    "cp1258": "vi",
    "cp874": "th",
    "cp932": "ja",
    "cp949": "ko",
    "gb18030": "zh",
    "cp950": "yue zh",
}
# Between two letters, these kinds of characters are a sign of a wrong code page: currency, symbols, low quotes.
_NOT_IN_WORDS = {"So", "Sm", "Sc", "Sk", "Cc", "Cn", "Co", "Ps"}


def decode_text(content: bytes, name: str, language: str | None = None) -> tuple[str, str]:
    """
    Decode text in UTF-8, in UTF-16, or in the Windows code page of its language.

    Args:
        content (`bytes`): The file's.
        name (`str`): The file's name, for messages.
        language (`str`, *optional*): Whisper's code. Without it, only UTF-8 and UTF-16 are read.

    Returns:
        `(str, str)`: the text, without BOM, and the encoding.

    Raises:
        ValueError: it is neither, or several code pages fit. The message has the line.
    """
    encoding = _unicode_encoding(content)
    try:
        text = content.decode(encoding)
        encoding = encoding.removesuffix("-sig")
        if "\0" not in text:
            return text.removeprefix("\ufeff"), encoding
        line = text[: text.index("\0")].count("\n") + 1
        problem = f"line {line} has a NUL byte"
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        problem = f"line {line} is not {encoding.removesuffix('-sig')} ({error.reason})"
        pages = [page for page, languages in _LANGUAGES_OF_CODE_PAGES.items() if language in languages.split()]
        texts = {page: _decode_code_page(content, page) for page in pages if encoding == "utf-8-sig"}
        fitting = [page for page, text in texts.items() if text is not None]
        if len(fitting) == 1:
            return str(texts[fitting[0]]), fitting[0]
        if fitting:
            problem += f", and may be {' or '.join(fitting)}"
        elif texts:
            problem += f", nor {' or '.join(pages)}, as Windows writes {language!r}"
    raise ValueError(
        f"{name} cannot be read after line {line - 1}: {problem}; save it in UTF-8 (in a spreadsheet: 'CSV UTF-8')"
    )


def _unicode_encoding(content: bytes) -> str:
    """UTF-16, if the start of the content says so, or UTF-8."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    start = content[:1000]
    low, high = start[::2].count(0), start[1::2].count(0)  # an ASCII character has a zero after it in LE, before in BE
    if low + high > len(start) / 4:
        return "utf-16-le" if high > low else "utf-16-be"
    return "utf-8-sig"


def _decode_code_page(content: bytes, page: str) -> str | None:
    """The text in a code page, or `None` if it cannot be one: undefined bytes, or words that nobody writes."""
    try:
        text = content.decode(page)
    except UnicodeDecodeError:
        return None
    for before, character, after in re.findall(r"(?=(\w)([^\x00-\x7f])(\w?))", text):
        if character.isupper() and before.islower():  # "cafŽ"
            return None
        if unicodedata.category(character) in _NOT_IN_WORDS and before.isalpha() and after.isalpha():
            return None
    return text
