"""Splits recordings by text, so that no sentence is in two parts."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Sequence

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


def _key(text: str) -> str:
    """Letters, marks and digits of a text, without case; of a text without any, the text."""
    folded = unicodedata.normalize("NFKC", text).casefold().strip()
    return "".join(mark for mark in folded if unicodedata.category(mark)[0] in "LMN") or folded
