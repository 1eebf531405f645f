"""Which of a teacher's transcripts to train on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import datasets

from ...data.rows import TEXT_COLUMN
from ...data.segments import START_COLUMN
from ...evaluation.normalization import leading_rate, normalize_text
from ...extras import require

logger = logging.getLogger(__name__)


def filter_pseudo_labels(
    labels: datasets.Dataset,
    *,
    min_log_probability: float | None = -1.0,
    max_compression_ratio: float | None = 2.4,
    max_no_speech_probability: float | None = 0.6,
    max_wer: float | None = None,
    other_labels: datasets.Dataset | None = None,
    max_disagreement: float = 0.2,
    language: str = "all",
) -> tuple[datasets.Dataset, dict[str, float]]:
    """
    Keep the pseudo-labels that pass all filters, and say how many hours each of them removes.

    Args:
        labels (`datasets.Dataset`): From [`pseudo_label`].
        min_log_probability (`float`, *optional*, defaults to -1.0):
            Least mean log-probability of a row's tokens, in nats. This default and the next two are Whisper's own for
            decoding a window again. `None` turns a filter off. A row without the score does not pass.
        max_compression_ratio (`float`, *optional*, defaults to 2.4): Above it, the text repeats itself.
        max_no_speech_probability (`float`, *optional*, defaults to 0.6): Above it, nobody may be speaking.
        max_wer (`float`, *optional*):
            Highest error rate against the given transcript, a fraction. Rows without one pass.
        other_labels (`datasets.Dataset`, *optional*): Those of a second teacher, for the same recordings.
        max_disagreement (`float`, *optional*, defaults to 0.2):
            With `other_labels`: highest share of a row's words that the second teacher heard differently.
        language (`str`, *optional*, defaults to `"all"`): Whose rules the words are compared by.

    Returns:
        `(datasets.Dataset, dict[str, float])`: the rows that are left, and hours: "total", "kept", and what each
        filter alone would remove, by the name of its column ("log_probability", ..., "disagreement").

    Raises:
        ValueError: no row is left, or the second teacher's labels are of other recordings (none in common, or one that
            has another length).
    """
    filters: dict[str, Callable[[Any], bool]] = {}
    if min_log_probability is not None:
        filters["log_probability"] = lambda value: value is not None and value >= min_log_probability
    if max_compression_ratio is not None:
        filters["compression_ratio"] = lambda value: value is not None and value <= max_compression_ratio
    if max_no_speech_probability is not None:
        filters["no_speech_probability"] = lambda value: value is not None and value <= max_no_speech_probability
    if max_wer is not None:
        filters["wer"] = lambda value: value is None or value <= max_wer
        if not any(value is not None for value in labels["wer"]):
            logger.warning("max_wer removes nothing: no recording has a transcript to compare with")
    columns = {name: labels[name][:] for name in filters}
    if other_labels is not None:
        columns["disagreement"] = disagreements(labels, other_labels, language)
        filters["disagreement"] = lambda value: value <= max_disagreement
    seconds = labels["seconds"][:]
    passes = {name: [bool(keeps(value)) for value in columns[name]] for name, keeps in filters.items()}
    kept = [row for row in range(len(labels)) if all(passed[row] for passed in passes.values())]
    hours = {"total": sum(seconds) / 3600, "kept": sum(seconds[row] for row in kept) / 3600}
    for name, passed in passes.items():
        hours[name] = sum(length for length, stays in zip(seconds, passed, strict=True) if not stays) / 3600
    logger.info("pseudo-labels: %s", describe_hours(hours))
    if not kept:
        raise ValueError(f"no pseudo-label passes the filters ({describe_hours(hours)}): make them wider")
    return labels.select(kept), hours


def describe_hours(hours: dict[str, float]) -> str:
    """The hours that are kept, and that each filter alone removes, in words."""
    scale, unit = (1, "h") if hours["total"] >= 1 else (60, "min")
    removed = ", ".join(
        f"{name} {scale * value:.2f} {unit}" for name, value in hours.items() if name not in ("total", "kept")
    )
    each = f"; each filter alone removes: {removed}" if removed else ""
    return f"{scale * hours['kept']:.2f} of {scale * hours['total']:.2f} {unit} kept{each}"


def disagreements(labels: datasets.Dataset, others: datasets.Dataset, language: str) -> list[float]:
    """
    The share of each row's words that a second teacher heard differently; characters in languages without spaces.

    Both teachers may divide a recording differently, so the words of whole recordings are aligned.

    Raises:
        ValueError: `others` are of other recordings.
    """
    texts, other_texts = _by_recording(labels), _by_recording(others)
    if not texts.keys() & other_texts.keys():
        raise ValueError("the second teacher's labels have no recording of the first one's: give those of one dataset")
    lengths, other_lengths = _lengths(labels), _lengths(others)
    for recording in lengths.keys() & other_lengths.keys():
        if abs(lengths[recording] - other_lengths[recording]) > 0.01:
            raise ValueError(
                f"the second teacher's labels are of other recordings: number {recording} has "
                f"{other_lengths[recording]:.2f} s, not {lengths[recording]:.2f} s: give those of one dataset"
            )
    shares = [1.0] * len(labels)
    for recording, rows in texts.items():
        words = [_words(text, language) for _, text in rows]
        heard = [word for _, text in other_texts.get(recording, []) for word in _words(text, language)]
        errors = _errors_by_word([word for part in words for word in part], heard)
        place = 0
        for (row, _), part in zip(rows, words, strict=True):
            shares[row] = sum(errors[place : place + len(part)]) / len(part) if part else 0.0
            place += len(part)
    return shares


def _by_recording(labels: datasets.Dataset) -> dict[int, list[tuple[int, str]]]:
    found: dict[int, list[tuple[int, str]]] = {}
    for row, (recording, text) in enumerate(zip(labels["recording"][:], labels[TEXT_COLUMN][:], strict=True)):
        found.setdefault(recording, []).append((row, text))
    return found


def _lengths(labels: datasets.Dataset) -> dict[int, float]:
    """Seconds of the recordings that are a row each. Rows with times are parts, which depend on the teacher."""
    rows = zip(labels["recording"][:], labels["seconds"][:], labels[START_COLUMN][:], strict=True)
    return {recording: seconds for recording, seconds, start in rows if start is None}


def _words(text: str, language: str) -> list[str]:
    text = normalize_text(text, language)
    return list(text) if leading_rate(language) == "cer" else text.split()


def _errors_by_word(words: Sequence[str], heard: Sequence[str]) -> list[float]:
    """The edits at each word. Words that the other heard in between count at the word before."""
    if not words or not heard:
        return [1.0] * len(words)
    output = require("jiwer").process_words(" ".join(words), " ".join(heard))
    errors = [0.0] * len(words)
    for chunk in output.alignments[0]:
        if chunk.type == "insert":
            errors[max(chunk.ref_start_idx - 1, 0)] += chunk.hyp_end_idx - chunk.hyp_start_idx
        elif chunk.type != "equal":
            for place in range(chunk.ref_start_idx, chunk.ref_end_idx):
                errors[place] += 1
    return errors
