"""Parts of a recording that have sound and no text."""

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


def gaps(waveform, *times):
    return loud_gaps(transcript(waveform, *times), waveform, RATE)


def transcript(waveform, *times):
    segments = [{"start": start, "end": end, "text": " da"} for start, end in times]
    return Transcript("ro", "ro", len(waveform) / RATE, segments)


@pytest.mark.parametrize(
    "level, times, expected",
    [
        (0.1, [(0, 10), (20, 30)], [(10, 20)]),
        (0.06, [(0, 10), (20, 30)], [(10, 20)]),
        (0.04, [(0, 10), (20, 30)], []),  # less than half as loud as the speech
        (0.0, [(0, 10), (20, 30)], []),
        (0.1, [(0, 10)], [(10, 30)]),
        (0.1, [(20, 30)], [(0, 20)]),
        (0.1, [(12, 18)], [(0, 12), (18, 30)]),
        (0.1, [(0, 10), (14.5, 30)], []),  # too short to tell from a pause
        (0.1, [(0, 10), (15, 30)], [(10, 15)]),
        (0.1, [(0, 30), (5, 6)], []),  # segments that overlap
        (0.1, [(10.6, 11.4)], [(0, 10), (12, 30)]),
        (0.1, [(0, 30)], []),
        (0.1, [], [(0, 30)]),  # no text at all
    ],
)
def test_a_gap_is_loud_and_long(level, times, expected):
    assert gaps(recording((10, 0.1), (10, level), (10, 0.1)), *times) == expected


@pytest.mark.parametrize("seconds, expected", [(2, []), (3, [(14, 17)])])
def test_a_cough_in_a_pause_is_no_gap(seconds, expected):
    waveform = recording((10, 0.1), (4, 0.001), (seconds, 0.1), (14 - seconds, 0.001), (2, 0.1))
    assert gaps(waveform, (0, 10), (28, 30)) == expected


def test_short_sounds_in_a_long_pause_do_not_add_up():
    waveform = recording((10, 0.1), *[(1, 0.1), (9, 0.001)] * 10, (10, 0.1))
    assert gaps(waveform, (0, 11), (110, 120)) == []


def test_silence_is_no_sound_at_any_level_of_the_speech():
    assert gaps(recording((10, 0), (20, 0)), (0, 10)) == []
    assert gaps(recording((60, 0.0005))) == []
    assert gaps(recording((10, 0.1), (20, 0.0005)) + 0.2, (0, 10)) == []  # an offset
    assert gaps(recording((8, 0.1), (52, 0)), (0, 30)) == []  # Whisper's end is late


def test_a_recording_shorter_than_a_second_has_no_gap():
    assert gaps(recording((0.4, 0.1)), (0, 0.2)) == gaps(np.zeros(0, dtype=np.float32)) == []


def test_all_gaps_of_a_recording_are_told_at_once():
    waveform, told = recording((40, 0.1)), []
    warn_of_gaps(Path("a.wav"), transcript(waveform, (10, 15), (25, 40)), waveform, RATE, told.append)
    assert told == [
        "warning: a.wav has no text from 0 to 10 s, 15 to 25 s, although there is sound. If someone speaks there, "
        "transcribe it again with vad (--vad --overwrite)"
    ]
    warn_of_gaps(Path("a.wav"), transcript(waveform, (0, 40)), waveform, RATE, told.append)
    assert len(told) == 1
