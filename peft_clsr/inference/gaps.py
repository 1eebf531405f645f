"""Tells of parts of a recording that are as loud as its speech, and have no text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from .subtitles import Transcript

MIN_GAP = 5.0  # seconds without text; shorter ones are pauses
MIN_LOUD = 3  # seconds of a gap that have to be loud
LOUD = 0.5  # of the level of the seconds with text, their median


def loud_gaps(transcript: Transcript, waveform: np.ndarray, rate: int) -> list[tuple[float, float]]:
    """
    Find the parts of a recording that have no text although they are loud: speech that was left out, or other sound.

    Args:
        transcript (`Transcript`): The recording's.
        waveform (`np.ndarray`): float32 [samples].
        rate (`int`): Samples a second.

    Returns:
        `list[tuple[float, float]]`: start and end of each part, in seconds. Empty if the transcript has no text.
    """
    seconds = len(waveform) // rate
    levels = np.sqrt(np.mean(np.square(waveform[: seconds * rate].reshape(seconds, rate), dtype=np.float64), axis=1))
    middles = np.arange(seconds) + 0.5
    spoken = np.zeros(seconds, dtype=bool)
    for segment in transcript.segments:
        spoken |= (segment["start"] <= middles) & (middles < segment["end"])
    if not spoken.any():
        return []
    loud = levels >= LOUD * np.median(levels[spoken])
    ends = [0.0, *(segment["end"] for segment in transcript.segments)]
    starts = [*(segment["start"] for segment in transcript.segments), transcript.seconds]
    return [
        (end, start)
        for end, start in zip(ends, starts, strict=True)
        if start - end >= MIN_GAP and loud[(middles >= end) & (middles < start)].sum() >= MIN_LOUD
    ]


def warn_of_gaps(
    path: Path, transcript: Transcript, waveform: np.ndarray, rate: int, warn: Callable[[str], None]
) -> None:
    """Give `warn` a message if a recording has [`loud_gaps`]."""
    gaps = loud_gaps(transcript, waveform, rate)
    if gaps:
        parts = ", ".join(f"{start:.0f} to {end:.0f} s" for start, end in gaps)
        warn(
            f"warning: {path} has no text from {parts}, where it is as loud as its speech. If someone speaks there, "
            "transcribe it with vad"
        )
