"""Reads transcripts with times from files beside recordings: SRT, VTT and TextGrid."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..extras import require
from .encodings import decode_text
from .table_files import name_key
from .table_reader import log_once

# In this order, where a recording has several.
TIMED_ENDINGS = (".textgrid", ".srt", ".vtt")
_ARROW = "-->"
_WORD_TIME = re.compile(r"<[\d:.]+>")  # of single words, in YouTube's captions
_NO_TIMES = "00:00:00.000 --> 00:00:00.000"
_JOINER = "\u2060"  # has no width; pysubs2 reads no time where it stands
# Labels of intervals without speech, as aligners write them.
_SILENCES = {"sil", "sp", "<sil>", "<p>", "<p:>"}


class TimedText(NamedTuple):
    """
    A text with times, as text: seconds, or what the file has instead.

    Args:
        start (`str`): Start in seconds.
        end (`str`): End in seconds.
        text (`str`): The text, in one line.
        place (`str`): The file and the line, for messages.
    """

    start: str
    end: str
    text: str
    place: str


def find_timed_texts(recording: Path, language: str, beside: Mapping[str, Path]) -> list[Path]:
    """
    Find the files with times of a recording: `talk.srt` or `talk.ro.srt` for `talk.mp3`. The first is to be read.

    Args:
        recording (`Path`): The recording.
        language (`str`): Code of the language whose texts are wanted.
        beside (`Mapping[str, Path]`): The files of its folder, from [`files_by_name`].
    """
    names = [f"{recording.stem}{middle}{ending}" for ending in TIMED_ENDINGS for middle in (f".{language}", "")]
    return [file for file in (find_beside(name, beside) for name in names) if file is not None]


def find_beside(name: str, beside: Mapping[str, Path]) -> Path | None:
    """The file of this name, else that of another spelling of it (see [`name_key`])."""
    return beside.get(name) or beside.get(name_key(name))


def files_by_name(files: Sequence[Path]) -> dict[str, Path]:
    """Files by their names, and by their [`name_key`], for [`find_beside`]."""
    return {name_key(file.name): file for file in files} | {file.name: file for file in files}


def read_timed_texts(path: Path, tier: str, language: str | None = None) -> list[TimedText]:
    """
    Read the texts of an SRT, VTT or TextGrid file.

    Tags and line ends within a text are removed. Times are not checked here. Of a TextGrid the interval tier of the
    name `tier` is read, in any case, else the only one that has text.

    Args:
        path (`Path`): The file.
        tier (`str`): Name of the tier.
        language (`str`, *optional*): Code of its language, for files that are not in UTF-8 or UTF-16.

    Returns:
        `list[TimedText]`: in the order of the file; empty if it has no text.

    Raises:
        ValueError: the file is no such file, or has several tiers and none of this name.
        OSError: the file cannot be opened.
    """
    text, encoding = decode_text(path.read_bytes(), str(path), language)
    if encoding != "utf-8":
        log_once(f"{path.parent}: subtitles that are not in UTF-8 are read as {encoding}, such as {path.name}")
    if not text.strip():
        return []
    if path.suffix.lower() == ".textgrid":
        return _read_textgrid(path, text, tier)
    return _read_subtitles(path, text.replace("\r\n", "\n").replace("\r", "\n"))


def _read_subtitles(path: Path, text: str) -> list[TimedText]:
    kind = path.suffix.lower()
    if kind == ".vtt" and not text.startswith("WEBVTT"):
        raise ValueError(f"{path} is no VTT file: its first line is not WEBVTT")
    lines = text.split("\n")
    cues = [number for number, line in enumerate(lines) if _ARROW in line]
    if not cues:
        if kind == ".vtt":
            return []
        raise ValueError(f"{path} is no SRT file: no line has times such as 00:00:01,000 --> 00:00:02,500")
    # pysubs2 would take a line with bad times for text of the subtitle before it. Its words are kept instead.
    formats = require("pysubs2.formats")
    times = formats.get_format_class(kind[1:]).TIMESTAMP
    given: dict[int, list[str]] = {}
    for number in cues:
        if len(times.findall(lines[number])) != 2:
            given[number] = [part.strip() or "no time" for part in lines[number].split(_ARROW, 1)]
            lines[number] = _NO_TIMES
    if kind == ".vtt":
        lines = _only_cues(lines)
    content = [line if _ARROW in line else _WORD_TIME.sub("", line).replace(":", f":{_JOINER}") for line in lines]
    subtitles = require("pysubs2").SSAFile.from_string("\n".join(content), format_=kind[1:])
    texts = []
    for number, subtitle in zip(cues, subtitles, strict=True):
        start, end = given.get(number, [f"{time / 1000:.3f}" for time in (subtitle.start, subtitle.end)])
        spoken = " ".join(html.unescape(subtitle.plaintext).replace(_JOINER, "").split())
        texts.append(TimedText(start, end, spoken, f"{path}, line {number + 1}"))
    return texts


def _only_cues(lines: list[str]) -> list[str]:
    """The lines of a VTT file, empty where they are no subtitle: names of cues, notes, styles. pysubs2 reads them."""
    kept, is_cue = [], False
    for line in lines:
        is_cue = _ARROW in line or (is_cue and bool(line.strip()))
        kept.append(line if is_cue else "")
    return kept


def _read_textgrid(path: Path, text: str, tier: str) -> list[TimedText]:
    textgrid_io = require("praatio.utilities.textgrid_io")
    try:
        tiers = textgrid_io.parseTextgridStr(text, includeEmptyIntervals=True)["tiers"]
    except Exception as error:  # praatio raises what its regular expressions and lists raise
        raise ValueError(f"{path} is no TextGrid that praatio reads ({type(error).__name__}: {error})") from error
    texts: dict[str, list[TimedText]] = {}
    for found in tiers:
        if found["class"] != "IntervalTier":
            continue
        name = found["name"]
        texts[name] = [
            TimedText(str(start), str(end), " ".join(label.split()), f"{path}, tier {name!r}, interval {number}")
            for number, (start, end, label) in enumerate(found["entries"], start=1)
            if label.strip() and label.strip().casefold() not in _SILENCES
        ]
    named = [name for name in texts if name.strip().casefold() == tier.casefold()]
    chosen = named or [name for name in texts if texts[name]]
    if len(chosen) > 1:
        raise ValueError(
            f"{path} has several interval tiers, {', '.join(map(repr, texts))}: rename the one with the transcripts "
            f"to {tier!r}, or give its name (text_column, --text_column)"
        )
    return texts[chosen[0]] if chosen else []
