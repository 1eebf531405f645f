"""Parts without text that are as loud as the speech of their recording."""

from pathlib import Path

import numpy as np
import pytest

from peft_clsr.inference.gaps import loud_gaps, warn_of_gaps
from peft_clsr.inference.subtitles import Transcript

RATE = 1000


def recording(*parts):
    """Noise; parts are (seconds, level)."""
    generator = np.random.default_rng(0)
    return np.concatenate([generator.normal(0, level, round(seconds * RATE)) for seconds, level in parts]).astype("f4")


def transcript(waveform, *times):
    segments = [{"start": start, "end": end, "text": " da"} for start, end in times]
    return Transcript("ro", "ro", len(waveform) / RATE, segments)


@pytest.mark.parametrize(
    "level, times, expected",
    [
        (0.1, [(0, 10), (20, 30)], [(10, 20)]),
        (0.1, [(0, 10)], [(10, 30)]),
        (0.1, [(20, 30)], [(0, 20)]),
        (0.1, [(12, 18)], [(0, 12), (18, 30)]),
        (0.001, [(0, 10), (20, 30)], []),  # a pause
        (0.1, [(0, 10), (14.5, 30)], []),  # too short to tell from one
        (0.1, [(0, 30)], []),
        (0.1, [], []),  # nothing to compare with, and the empty transcript is seen
    ],
)
def test_a_gap_is_loud_and_long(level, times, expected):
    waveform = recording((10, 0.1), (10, level), (10, 0.1))
    assert loud_gaps(transcript(waveform, *times), waveform, RATE) == expected


def test_a_cough_in_a_pause_is_no_gap():
    waveform = recording((10, 0.1), (4, 0.001), (2, 0.1), (4, 0.001), (10, 0.1))
    assert loud_gaps(transcript(waveform, (0, 10), (20, 30)), waveform, RATE) == []


def test_a_recording_shorter_than_a_second_has_no_gap():
    waveform = recording((0.4, 0.1))
    assert loud_gaps(transcript(waveform, (0, 0.2)), waveform, RATE) == []


def test_all_gaps_of_a_recording_are_told_at_once():
    waveform, told = recording((40, 0.1)), []
    warn_of_gaps(Path("a.wav"), transcript(waveform, (10, 15), (25, 40)), waveform, RATE, told.append)
    assert told == [
        "warning: a.wav has no text from 0 to 10 s, 15 to 25 s, where it is as loud as its speech. If someone speaks "
        "there, transcribe it with vad"
    ]
    warn_of_gaps(Path("a.wav"), transcript(waveform, (0, 40)), waveform, RATE, told.append)
    assert len(told) == 1
