"""Splits recordings by text, so that no sentence is in two parts."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence

from .segments import parse_time

PARTS = ("train", "validation", "test")
_HELD_OUT = 0.1  # share of the recordings for validation, and for test


class MissingSplitError(ValueError):
    """A dataset has no split of the name that is asked for."""


def split_by_text(texts: Sequence[str], parts: Sequence[str] = PARTS) -> list[str]:
    """
    Split recordings into 80 % to train on, 10 % for validation and 10 % for test.

    The same sentence is in one part only, whatever its case, spaces and punctuation. The parts depend on the texts
    alone, not on their order or on a seed. So runs with other seeds are measured on the same recordings.

    Args:
        texts (`Sequence[str]`): Transcripts. Recordings without one are in the first part.
        parts (`Sequence[str]`, *optional*): The first has what the others, of 10 % each, leave.

    Returns:
        `list[str]`: the part of each.

    Raises:
        ValueError: there are fewer sentences than parts.

    Example:

    ```py
    >>> split_by_text(["Bon dia", "Bona nit", "bon dia!", "Adéu"])
    ['train', 'test', 'train', 'validation']
    ```
    """
    keys = [_key(text) for text in texts]
    sizes = Counter(filter(None, keys))
    if len(sizes) < len(parts):
        raise ValueError(
            f"{len(sizes)} different sentences cannot be split into {', '.join(parts)}: record more, or make the "
            "parts yourself, in a column 'split'"
        )
    wanted = max(1, round(_HELD_OUT * sizes.total()))
    # In the order of their hashes; a sentence that is more than a part comes last.
    order = sorted(sizes, key=lambda key: (sizes[key] > wanted, hashlib.sha256(key.encode()).digest()))
    part_of: dict[str, str] = {}
    for place in range(len(parts) - 1, 0, -1):
        size = 0
        while size < wanted and len(order) > place:
            key = order.pop(0)
            part_of[key] = parts[place]
            size += sizes[key]
    return [part_of.get(key, parts[0]) for key in keys]


def split_segments(
    recordings: Sequence[Hashable], starts: Sequence[str], texts: Sequence[str], parts: Sequence[str] = PARTS
) -> tuple[list[str], str]:
    """
    Split segments into 80 % to train on, 10 % for validation and 10 % for test. They are heard with their neighbours.

    So each recording is in one part, by its text. Fewer recordings than parts are cut in time instead: the last
    segments of each are for the last part.

    Args:
        recordings (`Sequence[Hashable]`): The recording of each segment.
        starts (`Sequence[str]`): Its start, as [`parse_time`] reads it.
        texts (`Sequence[str]`): Its transcript.
        parts (`Sequence[str]`, *optional*): As of [`split_by_text`].

    Returns:
        `(list[str], str)`: the part of each, and how they were split, for a message.

    Raises:
        ValueError: there are fewer recordings than parts, and one has fewer segments than parts.
    """
    members: dict[Hashable, list[int]] = {}
    for segment, recording in enumerate(recordings):
        members.setdefault(recording, []).append(segment)
    if len(members) >= len(parts):
        spoken = [" ".join(texts[segment] for segment in segments) for segments in members.values()]
        part = dict(zip(members, split_by_text(spoken, parts), strict=True))
        return [part[recording] for recording in recordings], "recording"
    part_of = [parts[0]] * len(texts)
    for recording, segments in members.items():
        if len(segments) < len(parts):
            raise ValueError(f"{recording} has {len(segments)} segments, too few for {', '.join(parts)}: record more")
        order = sorted(segments, key=lambda segment: _time(starts[segment]))
        held_out = max(1, round(_HELD_OUT * len(order)))
        for place, segment in enumerate(reversed(order)):
            part_of[segment] = parts[max(0, len(parts) - 1 - place // held_out)]
    return part_of, f"time, the end of each recording for {parts[-1]}"


def _time(start: str) -> float:
    try:
        return parse_time(start)
    except ValueError:
        return 0.0  # it will not be used


def _key(text: str) -> str:
    """Letters, marks and digits of a text, without case; of a text without any, the text."""
    folded = unicodedata.normalize("NFKC", text).casefold().strip()
    return "".join(mark for mark in folded if unicodedata.category(mark)[0] in "LMN") or folded
