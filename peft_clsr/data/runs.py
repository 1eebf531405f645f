"""Runs: segments that follow each other in a recording, and are heard together in a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .windows import Window

if TYPE_CHECKING:
    from .window_rows import Utterance

_MAX_PAUSE = 5.0  # seconds between two segments of a run; in a longer pause, there may be speech without text
_MAX_HEARD = 224  # utterances; each is a token of a prompt, at least


def link_utterances(utterances: Sequence[Utterance]) -> list[Utterance]:
    """The same utterances, where each segment knows the one of its group that it follows in its recording."""
    places = {utterance.row: place for place, utterance in enumerate(utterances)}
    linked = []
    for utterance in utterances:
        before = None if utterance.part is None else places.get(utterance.part.before)  # type: ignore[arg-type]
        if before is not None and (
            utterance.part.pause > _MAX_PAUSE or utterances[before].group != utterance.group  # type: ignore[union-attr]
        ):
            before = None
        linked.append(utterance._replace(before=before))
    return linked


def pauses_before(utterances: Sequence[Utterance]) -> dict[int, tuple[int, float]]:
    """For each segment that follows another: the other one, and the seconds between the two."""
    return {
        place: (utterance.before, utterance.part.pause)
        for place, utterance in enumerate(utterances)
        if utterance.before is not None and utterance.part is not None
    }


def runs_of_window(window: Window, utterances: Sequence[Utterance]) -> list[tuple[float, list[Utterance]]]:
    """The utterances of a window in runs, each with the gap in seconds before it."""
    runs: list[tuple[float, list[Utterance]]] = []
    for place, (index, gap) in enumerate(zip(window.utterances, window.gaps, strict=True)):
        if place and utterances[index].before == window.utterances[place - 1]:
            runs[-1][1].append(utterances[index])
        else:
            runs.append((gap, [utterances[index]]))
    return runs


def heard_before(utterance: Utterance, utterances: Sequence[Utterance]) -> list[Utterance]:
    """The last segments before a segment in its recording, in their order."""
    heard: list[Utterance] = []
    while utterance.before is not None and len(heard) < _MAX_HEARD:
        utterance = utterances[utterance.before]
        heard.append(utterance)
    return heard[::-1]
