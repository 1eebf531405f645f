"""Rows of a dataset from a teacher's labels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import datasets

from ...data.rows import TEXT_COLUMN
from ...data.segments import END_COLUMN, START_COLUMN
from ...evaluation.error_rates import error_rates
from .scores import SCORES

logger = logging.getLogger(__name__)

WHOLE = 30.0  # seconds: up to here, a recording is one row


def label_rows(
    dataset: datasets.Dataset,
    labels: Mapping[int, dict[str, Any]],
    text_column: str,
    language: str,
) -> datasets.Dataset:
    """
    One row for each short recording, and one for each segment of a longer one, see [`pseudo_label`].

    Args:
        dataset (`datasets.Dataset`): The recordings as they were given, so that labels can be joined with others.
            No audio is decoded.
        labels (`Mapping[int, dict]`): Row to its label, with text.
        text_column (`str`): Column of given transcripts, if there is one.
        language (`str`): Tag of the language; for the error rates.
    """
    references = dataset.select_columns([text_column])[text_column] if text_column in dataset.column_names else None
    rows = []
    for row, label in labels.items():
        # Not stored with the label: transcripts may be mended without transcribing again.
        wer = _error_rate(label["text"], None if references is None else references[row], language)
        rows += [{**part, "wer": wer, "recording": row} for part in _rows_of(label)]
    unscored = sum(any(row[name] is None for name in SCORES) for row in rows)
    if unscored:
        logger.warning(
            "%d of %d pseudo-labels lack a score, so filters by it remove them: the decoder's limit cuts their text, "
            "or numbers overflow in half precision",
            unscored,
            len(rows),
        )
    names = [TEXT_COLUMN, START_COLUMN, END_COLUMN, "seconds", *SCORES, "wer", "recording"]
    kinds = {TEXT_COLUMN: "string", "recording": "int64"}
    selected = dataset.select([row["recording"] for row in rows])
    if text_column in selected.column_names:
        selected = selected.rename_column(text_column, "reference")
    selected = selected.remove_columns([name for name in names if name in selected.column_names])
    for name in names:
        column = datasets.Dataset.from_dict(
            {name: [row[name] for row in rows]},
            features=datasets.Features({name: datasets.Value(kinds.get(name, "float64"))}),
        )
        selected = datasets.concatenate_datasets([selected, column], axis=1)
    return selected


def _error_rate(text: str, reference: Any, language: str) -> float | None:
    if not isinstance(reference, str) or not reference.strip():
        return None
    rates = error_rates([text], [reference], language=language)[language]
    return rates[rates["rate"]]


def _rows_of(label: dict[str, Any]) -> list[dict[str, Any]]:
    segments = label["segments"]
    if label["seconds"] > WHOLE:
        return [
            {
                TEXT_COLUMN: segment["text"].strip(),
                START_COLUMN: segment["start"],
                END_COLUMN: segment["end"],
                "seconds": segment["end"] - segment["start"],
                **{name: segment[name] for name in SCORES},
            }
            for segment in segments
        ]
    # A whole recording is as sure as its tokens on average, and as doubtful as its worst window.
    lengths = [max(len(segment["text"]), 1) for segment in segments]
    scores = {name: [segment[name] for segment in segments] for name in SCORES}
    known = {name: values for name, values in scores.items() if None not in values}
    whole = dict.fromkeys(SCORES) | {name: max(values) for name, values in known.items()}
    if "log_probability" in known:
        total = sum(length * mean for length, mean in zip(lengths, known["log_probability"], strict=True))
        whole["log_probability"] = total / sum(lengths)
    start = label["start"]
    return [
        {
            TEXT_COLUMN: label["text"],
            START_COLUMN: start,
            END_COLUMN: None if start is None else start + label["seconds"],
            "seconds": label["seconds"],
            **whole,
        }
    ]
