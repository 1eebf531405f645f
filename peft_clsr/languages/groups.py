"""Related languages, by CLDR's groups of languages and distances."""

from __future__ import annotations

import functools
from pathlib import Path

from langcodes import Language, tag_distance
from transformers.models.whisper.tokenization_whisper import LANGUAGES

_MOST = 5
# Up to this distance of CLDR, speakers of one language often understand the other.
_CLOSE = 30
_ISO_CODES = {"jw": "jv", "tl": "fil"}


def related_languages(tag: str) -> list[str]:
    """
    Return up to five Whisper languages that are related to a language, the closest first.

    Those that its speakers often understand, by langcodes' distance, come first; then languages of its group, such as
    the Bantu languages; then those of the wider groups.

    Args:
        tag (`str`): A language tag, "rw".

    Returns:
        `list[str]`: Whisper's codes; empty for a language that is related to none.
    """
    distances = {code: tag_distance(tag, code) for code in LANGUAGES}
    close = [code for code in sorted(LANGUAGES, key=distances.__getitem__) if distances[code] <= _CLOSE]
    groups = _groups_of(Language.get(tag).language or tag)
    found = dict.fromkeys(close)
    for group in groups:
        found |= dict.fromkeys(code for code in LANGUAGES if group in _groups_of(_ISO_CODES.get(code, code)))
    return list(found)[:_MOST]


@functools.cache
def _groups_of(language: str) -> tuple[str, ...]:
    """The groups that a language belongs to, the smallest first."""
    groups, parents = [], _parents()
    while language in parents and parents[language] not in groups:
        language = parents[language]
        groups.append(language)
    return tuple(groups)


@functools.cache
def _parents() -> dict[str, str]:
    """The group that each language and each group is listed in."""
    lines = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    listed = (line.split(": ") for line in lines if not line.startswith("#"))
    return {member: group for group, members in listed for member in members.split()}
