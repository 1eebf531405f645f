"""Text of unknown encoding: UTF-8, UTF-16, or the Windows code page of the language."""

from __future__ import annotations

import codecs
import re
import unicodedata

from ..extras import require
from ..languages.tags import own_prompt_code

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
# charset-normalizer's "chaos" is 0 for clean text and 1 for mess. Code pages this near to each other are as likely.
_EQUALLY_CLEAN = 0.02
_SAMPLE_BYTES = 100_000


def decode_text(content: bytes, name: str, language: str | None = None) -> tuple[str, str]:
    """
    Decode text in UTF-8, in UTF-16, or in the Windows code page of its language.

    Args:
        content (`bytes`): The file's.
        name (`str`): The file's name, for messages.
        language (`str`, *optional*): A language tag. Without it, only UTF-8 and UTF-16 are read.

    Returns:
        `(str, str)`: the text, without BOM, and the encoding.

    Raises:
        ValueError: it is neither, or several code pages fit. The message has the line.
    """
    if content.startswith(b"PK\x03\x04"):
        raise ValueError(f"{name} is a workbook of Excel, or another zip file: save the sheet as 'CSV UTF-8'")
    encoding = _unicode_encoding(content)
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
        encoding = encoding.removesuffix("-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        problem = f"line {line} is not {encoding.removesuffix('-sig')} ({error.reason})"
        page = None
        if encoding == "utf-8-sig":
            page, reason = _find_code_page(content, language and (own_prompt_code(language) or language))
            problem += reason
        if page is None:
            raise ValueError(_refusal(name, line, problem)) from error
        text, encoding = content.decode(page), page
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(_refusal(name, line, f"line {line} has a NUL byte"))
    return text, encoding


def _refusal(name: str, line: int, problem: str) -> str:
    return f"{name} cannot be read after line {line - 1}: {problem}; save it in UTF-8 (in a spreadsheet: 'CSV UTF-8')"


def _find_code_page(content: bytes, language: str | None) -> tuple[str | None, str]:
    """The code page of text that is not in UTF-8; or `None`, and why."""
    if _is_damaged_utf8(content):
        return None, ", but most of the text is: mend it there"
    pages = [page for page, languages in _LANGUAGES_OF_CODE_PAGES.items() if language in languages.split()]
    fitting = [page for page in pages if _decode_code_page(content, page) is not None]
    if len(fitting) > 1:
        fitting = _cleanest(content, fitting)
    if len(fitting) == 1:
        return fitting[0], ""
    if fitting:
        return None, f", and may be {' or '.join(fitting)}"
    return None, f", nor {' or '.join(pages)}, as Windows writes {language!r}" if pages else ""


def _is_damaged_utf8(content: bytes) -> bool:
    """True if UTF-8 decodes most characters beyond ASCII. Other encodings hardly ever look like it."""
    text = content.decode("utf-8", errors="replace")
    broken = text.count("\ufffd")
    return sum(not character.isascii() for character in text) - broken > broken


def _cleanest(content: bytes, pages: list[str]) -> list[str]:
    """The code page in which charset-normalizer finds the least mess; all, if others are about as clean."""
    # ASCII lines would hide the mess.
    sample = b"\n".join(line for line in content.splitlines() if not line.isascii())[:_SAMPLE_BYTES]
    matches = require("charset_normalizer").from_bytes(sample, cp_isolation=pages)
    mess = {match.encoding: match.chaos for match in matches if match.encoding in pages}
    clean = [page for page in pages if page in mess and mess[page] <= min(mess.values()) + _EQUALLY_CLEAN]
    return clean if len(clean) == 1 else pages


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
