"""Rows that are a part of a recording, from `start` to `end`: their times, and which follow each other."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from .audio import EmptyAudioError, audio_name, read_audio

START_COLUMN, END_COLUMN = "start", "end"

# Hand-made times are not exact. A segment that overlaps the next by at most so many seconds ends where that starts;
# one that ends so many seconds after the recording, at most, ends with it.
MAX_OVERLAP = 0.3
MAX_OVERRUN = 1.0
# A longer segment is not used, so it may lie over others, as a translator's credit over a whole film does.
_LONGEST = 30.0
_CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:[.,]\d*)?)")


class Segment(NamedTuple):
    """
    The part of a recording that a row is.

    Args:
        start (`float`): Seconds from the beginning of the recording.
        end (`float`): Likewise.
        before (`int`, *optional*): The row of the segment before it, if no speech between them may be unknown.
        pause (`float`): Seconds without a segment before it.
    """

    start: float
    end: float
    before: int | None = None
    pause: float = 0.0


class BadSegment(NamedTuple):
    """Why a row with times is left out: an outcome, as of `rows.OUTCOMES`, and a sentence without the row's name."""

    outcome: str
    problem: str


def parse_time(value: Any) -> float:
    """
    Seconds of a number, or of a text such as "12.5", "12,5", "01:02.5" or "00:01:02.500".

    Raises:
        ValueError: it is no time.
    """
    try:
        seconds = float(value.strip().replace(",", ".") if isinstance(value, str) else value)
    except (TypeError, ValueError):
        clock = _CLOCK.fullmatch(str(value).strip())
        if clock is None:
            raise ValueError(f"{value!r} is no time: expected seconds (12.5) or 00:00:12.500") from None
        hours, minutes, rest = clock.groups()
        seconds = int(hours or 0) * 3600 + int(minutes) * 60 + float(rest.replace(",", "."))
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"{value!r} is no time: expected seconds from the beginning of the recording, 0 or more")
    return seconds


def segment_times(row: dict[str, Any]) -> tuple[float, float] | None:
    """
    Start and end of a row in seconds, or `None` for a row without times: it is a whole recording.

    Raises:
        ValueError: one of them is no time or is missing, or the end is not after the start.
    """
    cells = [row.get(START_COLUMN), row.get(END_COLUMN)]
    if all(cell is None or cell == "" for cell in cells):
        return None
    start, end = map(parse_time, cells)
    if end <= start:
        raise ValueError(f"it ends at {end:.2f} s, not after its start at {start:.2f} s")
    return start, end


def read_row(row: dict[str, Any], audio_column: str, sampling_rate: int) -> np.ndarray:
    """
    Read the audio of a row, or the part of it from `start` to `end`.

    Returns:
        `np.ndarray`: float32 [samples] at a rate in Hz.

    Raises:
        ValueError: as [`read_audio`] and [`segment_times`].
    """
    try:
        times = segment_times(row)
    except ValueError as error:
        raise ValueError(f"audio {audio_name(row[audio_column])}: {error}") from error
    return read_audio(row[audio_column], sampling_rate, *(times or ()))


def find_segments(
    rows: Iterable[tuple[int, dict[str, Any]]], audio_column: str, seconds_of: Callable[[dict[str, Any]], float]
) -> dict[int, Segment | BadSegment]:
    """
    Read and check the times of rows.

    Args:
        rows (`Iterable[tuple[int, dict]]`): Numbers of rows, and rows with `start`, `end` and audio.
        audio_column (`str`): Column of the audio. Rows of one path, or of the same content, are one recording.
        seconds_of (`Callable`): Length of a row's recording in seconds; called once for each recording.

    Returns:
        `dict[int, Segment | BadSegment]`: for each row with times. Rows without times are left out.
    """
    found: dict[int, Segment | BadSegment] = {}
    recordings: dict[Any, list[int]] = {}
    lengths: dict[Any, float | BadSegment] = {}
    for number, row in rows:
        key = _recording_key(row[audio_column])
        try:
            times = segment_times(row)
        except ValueError as error:
            found[number] = BadSegment("bad_times", str(error))
        else:
            if times is None:
                continue
            if key not in lengths:
                lengths[key] = _length(row, seconds_of)
            found[number] = _within(*times, lengths[key])
        recordings.setdefault(key, []).append(number)
    for numbers in recordings.values():
        _compare(numbers, found)
    return found


def _length(row: dict[str, Any], seconds_of: Callable[[dict[str, Any]], float]) -> float | BadSegment:
    try:
        return seconds_of(row)
    except ValueError as error:
        return BadSegment("empty" if isinstance(error, EmptyAudioError) else "unreadable", str(error))


def _within(start: float, end: float, length: float | BadSegment) -> Segment | BadSegment:
    """A segment, if it lies within the recording."""
    if isinstance(length, BadSegment):
        return length
    if start >= length or end > length + MAX_OVERRUN:
        return BadSegment(
            "beyond_audio",
            f"the recording has only {length:.2f} s (times count from its beginning; if the file is already cut, "
            f"remove the columns {START_COLUMN!r} and {END_COLUMN!r})",
        )
    return Segment(start, min(end, length))


def _compare(numbers: list[int], found: dict[int, Segment | BadSegment]) -> None:
    """Trim the segments of a recording, refuse those that overlap, and link each to the one before it."""
    segments: dict[int, Segment] = {}
    unknown = []
    for number in numbers:
        segment = found[number]
        if isinstance(segment, Segment):
            segments[number] = segment
        else:
            unknown.append(number)
    order = sorted(segments, key=lambda number: segments[number][:2])
    order = [number for number in order if segments[number].end - segments[number].start <= _LONGEST]
    ends = {number: segment.end for number, segment in segments.items()}
    overlapping: dict[int, int] = {}
    for place, number in enumerate(order):
        start, end = segments[number][:2]
        for other in order[place + 1 :]:
            other_start, other_end = segments[other][:2]
            if other_start >= end:
                break
            overlap = min(end, other_end) - other_start
            if overlap <= min(MAX_OVERLAP, (end - start) / 2, (other_end - other_start) / 2):
                ends[number] = min(ends[number], other_start)
            else:
                overlapping.setdefault(number, other)
                overlapping.setdefault(other, number)
    before: int | None = None
    free_from = 0.0
    for number in order:
        start, end = segments[number].start, ends[number]
        # The speech of a row without usable times may be anywhere between the rows around it.
        first, last = sorted((-1 if before is None else before, number))
        if any(first < row < last for row in unknown):
            found[number] = Segment(start, end)
        else:
            found[number] = Segment(start, end, before, max(0.0, start - free_from))
        before, free_from = number, max(free_from, end)
    for number, other in overlapping.items():
        found[number] = BadSegment(
            "overlap",
            f"it overlaps item {other}, {segments[other].start:.2f} to {segments[other].end:.2f} s, by more than "
            f"{MAX_OVERLAP} s",
        )


def _recording_key(audio: Any) -> Any:
    """A key that rows of the same recording share."""
    if isinstance(audio, dict) and audio.get("array") is not None:
        start = audio["array"][:4096]
        return len(audio["array"]), hashlib.sha256(repr(list(start)).encode()).digest()
    if isinstance(audio, dict) and audio.get("bytes") is not None:
        content = audio["bytes"]
        return audio.get("path"), len(content), hashlib.sha256(content[:65536]).digest()
    return audio_name(audio)
