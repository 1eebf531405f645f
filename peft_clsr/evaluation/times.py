"""How well the times of segments match those of what was said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NEAR = 0.5  # seconds


def time_errors(heard: Sequence[tuple[float, float]], said: Sequence[tuple[float, float]]) -> list[float]:
    """
    The error in time of each utterance: by how much its start or its end was missed, whichever is worse.

    An utterance is compared with the segment that overlaps it most. One that no segment overlaps is missed by its
    whole distance to the nearest.

    Args:
        heard (`Sequence[tuple[float, float]]`): Start and end in seconds of each segment of a transcript.
        said (`Sequence[tuple[float, float]]`): Start and end in seconds of each utterance.

    Returns:
        `list[float]`: seconds, one an utterance; infinite if there are no segments.
    """
    if not heard:
        return [float("inf")] * len(said)
    starts, ends = np.asarray(heard, dtype=float).T
    errors = []
    for start, end in said:
        overlaps = np.minimum(ends, end) - np.maximum(starts, start)
        distances = np.maximum(np.abs(starts - start), np.abs(ends - end))
        best = np.flatnonzero(overlaps == overlaps.max())
        errors.append(float(distances[best].min()))
    return errors


def summarize_times(errors: Sequence[float]) -> dict[str, float | None]:
    """
    Summarize errors in time.

    Returns:
        `dict`: "median_time_error" in seconds, `None` if it is infinite, and "on_time", the share of utterances within
        0.5 s.
    """
    median = float(np.median(errors))
    return {
        "median_time_error": round(median, 3) if np.isfinite(median) else None,
        "on_time": float(np.mean(np.asarray(errors) <= NEAR)),
    }
