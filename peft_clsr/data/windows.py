"""Plans which utterances share a window of the context."""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

MIN_GAP, MAX_GAP = 0.1, 0.6  # seconds of silence before each utterance; less before one that fills its window
SHORTEST_TARGET = 4.0  # seconds
_DRAWS = 20


@dataclass(frozen=True)
class Window:
    """
    Utterances that are heard together.

    Args:
        utterances (`tuple[int, ...]`): Their indices, in the order of speech.
        gaps (`tuple[float, ...]`):
            Seconds of silence before each of them, or of the recording, if it follows the one before it there.
        cut (`tuple[float, float]`, *optional*):
            If the window's end cuts the segment that follows in the recording: the seconds from the last utterance to
            this segment, and those of the segment in the window.
    """

    utterances: tuple[int, ...]
    gaps: tuple[float, ...]
    cut: tuple[float, float] | None = None


class WindowPlan:
    """
    Packs utterances into windows, anew in each epoch, and each utterance into exactly one window.

    Every epoch has the same number of windows of each group, as samplers and schedules count them once. Of the
    windows, about `single` hold one utterance, half of the others are as full as possible, and the rest have a length
    drawn between 4 s and `max_seconds`. Segments of a recording stay in their order.

    Args:
        seconds (`Sequence[float]`): Length of each utterance, at most `max_seconds`.
        tokens (`Sequence[int]`): Tokens that each utterance adds to the labels, at most `max_tokens`.
        groups (`Sequence[Hashable]`): Utterances of one group may share a window: those of a language and a speaker.
        max_seconds (`float`): Longest window.
        max_tokens (`int`): Most tokens of a window.
        single (`float`): Share of windows that hold one utterance, in [0, 1].
        seed (`int`): Seed of all draws.
        before (`Mapping[int, tuple[int, float]]`, *optional*):
            For a segment of a recording, the one before it in the same group, and the seconds between the two.
    """

    def __init__(
        self,
        seconds: Sequence[float],
        tokens: Sequence[int],
        groups: Sequence[Hashable],
        max_seconds: float,
        max_tokens: int,
        single: float,
        seed: int,
        before: Mapping[int, tuple[int, float]] | None = None,
    ) -> None:
        self.seconds = list(seconds)
        self.tokens = list(tokens)
        self.max_seconds = max_seconds
        self.max_tokens = max_tokens
        self.single = single
        self.seed = seed
        members: dict[Hashable, list[int]] = {}
        for utterance, group in enumerate(groups):
            members.setdefault(group, []).append(utterance)
        self._before = dict(before or {})
        self._after = {previous: utterance for utterance, (previous, _) in self._before.items()}
        self._members = [
            [self._chain(first) for first in group if first not in self._before] for group in members.values()
        ]
        self._first = [self._pack(group, self._random(0, number)) for number, group in enumerate(self._members)]

    def __len__(self) -> int:
        return sum(map(len, self._first))

    def windows(self, epoch: int) -> list[Window]:
        """The windows of an epoch: those of the first group, then those of the second, and so on."""
        windows = []
        for number, (group, first) in enumerate(zip(self._members, self._first, strict=True)):
            generator = self._random(epoch, number)
            packed = self._pack_into(group, len(first), generator) or first
            windows += [self._with_gaps(utterances, generator) for utterances in packed]
        return windows

    def _random(self, epoch: int, group: int) -> random.Random:
        return random.Random(f"{self.seed} {epoch} {group}")

    def _chain(self, utterance: int) -> list[int]:
        """An utterance and those that follow it in its recording."""
        chain = [utterance]
        while chain[-1] in self._after:
            chain.append(self._after[chain[-1]])
        return chain

    def _pack_into(self, group: list[list[int]], number: int, generator: random.Random) -> list[list[int]] | None:
        """Packs into exactly `number` windows; `None` if some draws did not succeed, as may be with few utterances."""
        for _ in range(_DRAWS):
            packed = self._pack(group, generator)
            while len(packed) < number:  # there are at least as many utterances as windows
                longest = max(range(len(packed)), key=lambda index: len(packed[index]))
                window = packed.pop(longest)
                packed += [window[: len(window) // 2], window[len(window) // 2 :]]
            while len(packed) > number and self._join_shortest(packed):
                pass
            if len(packed) == number:
                generator.shuffle(packed)
                return packed
        return None

    def _pack(self, group: list[list[int]], generator: random.Random) -> list[list[int]]:
        order = [utterance for chain in generator.sample(group, len(group)) for utterance in chain]
        packed, window = [], [order[0]]
        target = self._target(generator)
        for utterance in order[1:]:
            if not self._fit([*window, utterance], target):
                packed.append(window)
                window, target = [], self._target(generator)
            window.append(utterance)
        return [*packed, window]

    def _target(self, generator: random.Random) -> float:
        if generator.random() < self.single:
            return 0.0  # the first utterance is always taken
        if generator.random() < 0.5:
            return self.max_seconds
        return generator.uniform(min(SHORTEST_TARGET, self.max_seconds), self.max_seconds)

    def _fit(self, utterances: list[int], seconds: float) -> bool:
        tokens = sum(self.tokens[utterance] for utterance in utterances)
        return self._length(utterances) <= seconds and tokens <= self.max_tokens

    def _length(self, utterances: list[int]) -> float:
        """Seconds of a window with the shortest gaps."""
        pauses = [MIN_GAP if pause is None else pause for pause in self._pauses(utterances)]
        return sum(self.seconds[utterance] for utterance in utterances) + sum(pauses)

    def _pauses(self, utterances: list[int]) -> list[float | None]:
        """For each utterance the seconds to the one before it, if that is the one before it in its recording."""
        pauses: list[float | None] = []
        for previous, utterance in zip([None, *utterances], utterances, strict=False):
            before, pause = self._before.get(utterance, (None, 0.0))
            pauses.append(None if before is None or before != previous else pause)
        return pauses

    def _join_shortest(self, packed: list[list[int]]) -> bool:
        """Joins the two shortest windows, if they fit into one."""
        packed.sort(key=self._length)
        joined = packed[0] + packed[1]
        if not self._fit(joined, self.max_seconds):
            return False
        packed[:2] = [joined]
        return True

    def _with_gaps(self, utterances: list[int], generator: random.Random) -> Window:
        """Draws the gaps; where they do not fit, they shrink alike."""
        pauses = self._pauses(utterances)
        extra = [generator.uniform(0, MAX_GAP - MIN_GAP) if pause is None else 0.0 for pause in pauses]
        room = self.max_seconds - self._length(utterances)
        scale = min(1.0, max(room, 0.0) / max(sum(extra), 1e-9))
        shortest = max(0.0, MIN_GAP + min(room, 0.0))  # one utterance may need all of the window
        gaps = [shortest + scale * gap if pause is None else pause for gap, pause in zip(extra, pauses, strict=True)]
        return Window(tuple(utterances), tuple(gaps), self._cut(utterances, room - scale * sum(extra)))

    def _cut(self, utterances: list[int], room: float) -> tuple[float, float] | None:
        """The `cut` of a [`Window`] with `room` in seconds, for a segment that crosses its end."""
        following = self._after.get(utterances[-1])
        if following is None:
            return None
        pause = self._before[following][1]
        return (pause, room - pause) if pause < room < pause + self.seconds[following] else None
