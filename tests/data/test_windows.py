"""Plans of windows: which utterances are heard together."""

import random

import pytest

from peft_clsr.data.windows import MAX_GAP, MIN_GAP, WindowPlan


def plan(seconds, groups=None, *, tokens=None, max_seconds=30.0, max_tokens=440, single=0.1, seed=0):
    groups = ["ro"] * len(seconds) if groups is None else groups
    return WindowPlan(seconds, tokens or [10] * len(seconds), groups, max_seconds, max_tokens, single, seed)


def utterances(number, longest=8.0, seed=1):
    draws = random.Random(seed)
    return [draws.uniform(0.5, longest) for _ in range(number)]


@pytest.mark.parametrize("number", [1, 2, 3, 7, 40, 600])
@pytest.mark.parametrize("longest", [2.0, 8.0, 29.0])
def test_each_utterance_is_in_one_window_of_each_epoch_and_their_number_stays(number, longest):
    seconds = utterances(number, longest)
    planned = plan(seconds)
    for epoch in range(6):
        windows = planned.windows(epoch)
        assert len(windows) == len(planned)
        assert sorted(member for window in windows for member in window.utterances) == list(range(number))
        for window in windows:
            assert all(MIN_GAP <= gap <= MAX_GAP for gap in window.gaps)
            assert sum(seconds[member] for member in window.utterances) + sum(window.gaps) <= 30.0 + 1e-6


@pytest.mark.parametrize("length, gap", [(29.8, 0.15), (29.9, 0.1), (29.95, 0.05), (30.0, 0.0)])
def test_an_utterance_may_fill_its_window(length, gap):
    planned = plan([length, 2.0, length])
    for epoch in range(4):
        windows = [window for window in planned.windows(epoch) if window.utterances != (1,)]
        assert sorted(window.utterances for window in windows) == [(0,), (2,)]
        for window in windows:
            assert 0 <= window.gaps[0] <= 30 - length + 1e-9 and window.gaps[0] >= min(gap, MIN_GAP) - 1e-9


def test_epochs_differ_and_a_seed_repeats_them():
    seconds = utterances(60)
    assert plan(seconds).windows(1) == plan(seconds).windows(1)
    assert plan(seconds).windows(1) != plan(seconds).windows(2)
    assert plan(seconds).windows(1) != plan(seconds, seed=1).windows(1)


def test_windows_have_one_group_and_the_same_groups_in_each_epoch():
    seconds, groups = utterances(90), ["ro", "ca", "ro"] * 30
    planned = plan(seconds, groups)
    of_epoch = []
    for epoch in range(4):
        kinds = [{groups[member] for member in window.utterances} for window in planned.windows(epoch)]
        assert all(len(kind) == 1 for kind in kinds)
        of_epoch.append(kinds)
    assert all(kinds == of_epoch[0] for kinds in of_epoch)


def test_labels_fit_into_the_decoder():
    tokens = [100] * 20
    for epoch in range(4):
        windows = plan([1.0] * 20, tokens=tokens, max_tokens=250).windows(epoch)
        assert max(len(window.utterances) for window in windows) == 2


def test_a_share_of_windows_has_one_utterance_and_windows_have_all_lengths():
    seconds = [2.0] * 600
    windows = plan(seconds, single=0.2).windows(0)
    assert 0.08 < sum(len(window.utterances) == 1 for window in windows) / len(windows) < 0.4
    assert all(len(window.utterances) == 1 for window in plan(seconds, single=1).windows(0))
    lengths = [len(window.utterances) for window in plan(seconds, single=0).windows(0)]
    assert max(lengths) == 14  # 14 · 2.1 s
    assert 0.3 < sum(length >= 13 for length in lengths) / len(lengths) < 0.75
    assert len({length for length in lengths if length < 13}) > 5
