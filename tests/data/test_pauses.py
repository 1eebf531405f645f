"""Recordings are cut at pauses, and only speech is left."""

import sys

import numpy as np
import pytest
import torch
from helpers import noise, syllables

from peft_clsr import cut_at_pauses
from peft_clsr.data.pauses import load_silero


def silence(seconds):
    return np.zeros(round(seconds * 16000), dtype=np.float32)


# Speech from 3 to 7, 8 to 11 and 16 to 18 s.
TALK = [silence(3), syllables(4), silence(1), syllables(3, seed=9), silence(5), syllables(2, seed=5), silence(3)]


def test_long_pauses_are_left_out_and_short_ones_stay():
    (start, end), (later_start, later_end) = cut_at_pauses(np.concatenate(TALK))
    assert [start, end, later_start, later_end] == pytest.approx([3, 11, 16, 18], abs=0.4)
    assert start < 3 and end > 11 and later_start < 16 and later_end > 18  # with a margin


def test_speech_that_is_longer_than_a_part_is_cut_at_its_pause():
    parts = cut_at_pauses(np.concatenate(TALK), max_seconds=5)
    assert parts == [(pytest.approx(a, abs=0.4), pytest.approx(b, abs=0.4)) for a, b in ((3, 7), (8, 11), (16, 18))]


def test_speech_without_a_pause_is_cut_all_the_same_and_nothing_is_lost():
    parts = cut_at_pauses(np.concatenate(TALK), max_seconds=1)
    assert all(0 < end - start <= 1 for start, end in parts)
    assert all(end <= start for (_, end), (start, _) in zip(parts, parts[1:], strict=False))
    assert 9 < sum(end - start for start, end in parts) < 11.5  # 9 s of speech, and margins


@pytest.mark.parametrize("sound", [silence(4), noise(4), silence(0)], ids=["silence", "noise", "nothing"])
def test_without_speech_there_is_no_part(sound):
    assert cut_at_pauses(sound) == []


def test_loading_silero_leaves_the_threads_of_torch_as_they_were(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "silero_vad"]:
        monkeypatch.delitem(sys.modules, name)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        load_silero()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling_rate": 44100}, "sampling rate is 44100 Hz; silero-vad needs 16000 or 8000"),
        ({"max_seconds": 0.5}, "max_seconds is 0.5; expected at least 1 s"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        cut_at_pauses(silence(1), **arguments)
