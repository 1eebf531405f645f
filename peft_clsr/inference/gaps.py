"""Finds parts of a recording that have sound and no text."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np

from .subtitles import Transcript

MIN_GAP = 5.0  # seconds without text; shorter ones are pauses
MIN_LOUD = 3  # seconds of sound in a row
LOUD = 0.5  # of the median level of the seconds with text
FLOOR = 0.001  # -60 dB: less is silence in any recording


def loud_gaps(transcript: Transcript, waveform: np.ndarray, rate: int) -> list[tuple[float, float]]:
    """
    Find the parts of a recording that have sound and no text: speech that was left out, or other sound.

    A gap between segments counts from 5 s on. It has sound if 3 s in a row have half the level of the seconds with
    text, their median, or more; without any text, -60 dB or more.

    Args:
        transcript (`Transcript`): The recording's, its segments in order of their start.
        waveform (`np.ndarray`): float32 [samples].
        rate (`int`): Of the samples, in Hz.

    Returns:
        `list[tuple[float, float]]`: from the first second of sound in each such gap to the last.
    """
    seconds = len(waveform) // rate
    # The deviation, as a constant offset is no sound. One by one, as an hour's squares would take half a gigabyte.
    levels = np.array([waveform[second * rate : (second + 1) * rate].std() for second in range(seconds)])
    places = np.arange(seconds)
    spoken = np.zeros(seconds, dtype=bool)
    gaps, heard = [], 0.0
    for segment in transcript.segments:
        gaps.append((heard, segment["start"]))
        heard = max(heard, segment["end"])
        spoken |= (places + 1 > segment["start"]) & (places < segment["end"])
    gaps.append((heard, transcript.seconds))
    level = max(FLOOR, LOUD * float(np.median(levels[spoken]))) if spoken.any() else FLOOR
    parts = []
    for start, end in gaps:
        if end - start < MIN_GAP:
            continue
        inside = places[(places >= start) & (places + 1 <= end)]
        runs = [list(run) for is_loud, run in groupby(inside, lambda place: bool(levels[place] >= level)) if is_loud]
        if any(len(run) >= MIN_LOUD for run in runs):
            parts.append((float(runs[0][0]), float(runs[-1][-1] + 1)))
    return parts


def warn_of_gaps(
    path: Path, transcript: Transcript, waveform: np.ndarray, rate: int, warn: Callable[[str], None]
) -> None:
    """Give `warn` a message if a recording has [`loud_gaps`]."""
    gaps = loud_gaps(transcript, waveform, rate)
    if gaps:
        parts = ", ".join(f"{start:.0f} to {end:.0f} s" for start, end in gaps)
        warn(
            f"warning: {path} has no text from {parts}, although there is sound. If someone speaks there, transcribe "
            "it again with vad (--vad --overwrite)"
        )
