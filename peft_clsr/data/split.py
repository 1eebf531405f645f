"""Splits recordings by text, so that no sentence is in two parts."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence

from .segments import parse_time

PARTS = ("train", "validation", "test")
_HELD_OUT = 0.1  # share of the recordings for validation, and for test


def split_by_text(texts: Sequence[str]) -> list[str]:
    """
    Split recordings into 80 % to train on, 10 % for validation and 10 % for test.

    The same sentence is in one part only, whatever its case, spaces and punctuation. The parts depend on the texts
    alone, not on their order or on a seed. So runs with other seeds are measured on the same recordings.

    Args:
        texts (`Sequence[str]`): Transcripts. Recordings without one are in "train".

    Returns:
        `list[str]`: "train", "validation" or "test" for each.

    Raises:
        ValueError: there are fewer than three sentences.

    Example:

    ```py
    >>> split_by_text(["Bon dia", "Bona nit", "bon dia!", "Adéu"])
    ['train', 'test', 'train', 'validation']
    ```
    """
    keys = [_key(text) for text in texts]
    sizes = Counter(filter(None, keys))
    if len(sizes) < len(PARTS):
        raise ValueError(
            f"{len(sizes)} different sentences cannot be split into {', '.join(PARTS)}: record more, or make the "
            "parts yourself, in a column 'split'"
        )
    wanted = max(1, round(_HELD_OUT * sizes.total()))
    # In the order of their hashes; a sentence that is more than a part comes last.
    order = sorted(sizes, key=lambda key: (sizes[key] > wanted, hashlib.sha256(key.encode()).digest()))
    parts: dict[str, str] = {}
    for part in ("test", "validation"):
        size = 0
        while size < wanted and len(order) > 1 + (part == "test"):
            key = order.pop(0)
            parts[key] = part
            size += sizes[key]
    return [parts.get(key, "train") for key in keys]


def split_segments(
    recordings: Sequence[Hashable], starts: Sequence[str], texts: Sequence[str]
) -> tuple[list[str], str]:
    """
    Split segments into 80 % to train on, 10 % for validation and 10 % for test. They are heard with their neighbours.

    So each recording is in one part, by its text. Fewer than three recordings are cut in time instead: the last
    segments of each are for test.

    Args:
        recordings (`Sequence[Hashable]`): The recording of each segment.
        starts (`Sequence[str]`): Its start, as [`parse_time`] reads it.
        texts (`Sequence[str]`): Its transcript.

    Returns:
        `(list[str], str)`: "train", "validation" or "test" for each, and how they were split, for a message.

    Raises:
        ValueError: a recording of fewer than three has fewer than three segments.
    """
    members: dict[Hashable, list[int]] = {}
    for segment, recording in enumerate(recordings):
        members.setdefault(recording, []).append(segment)
    if len(members) >= len(PARTS):
        spoken = [" ".join(texts[segment] for segment in segments) for segments in members.values()]
        part = dict(zip(members, split_by_text(spoken), strict=True))
        return [part[recording] for recording in recordings], "recording"
    parts = ["train"] * len(texts)
    for recording, segments in members.items():
        if len(segments) < len(PARTS):
            raise ValueError(f"{recording} has {len(segments)} segments, too few for {', '.join(PARTS)}: record more")
        order = sorted(segments, key=lambda segment: _time(starts[segment]))
        held_out = max(1, round(_HELD_OUT * len(order)))
        for place, segment in enumerate(reversed(order)):
            if place < 2 * held_out:
                parts[segment] = "test" if place < held_out else "validation"
    return parts, "time, the end of each recording for test"


def _time(start: str) -> float:
    try:
        return parse_time(start)
    except ValueError:
        return 0.0  # it will not be used


def _key(text: str) -> str:
    """Letters, marks and digits of a text, without case; of a text without any, the text."""
    folded = unicodedata.normalize("NFKC", text).casefold().strip()
    return "".join(mark for mark in folded if unicodedata.category(mark)[0] in "LMN") or folded
