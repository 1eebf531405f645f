"""Rows of a dataset from a teacher's labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets

from ...data.rows import TEXT_COLUMN
from ...data.segments import END_COLUMN, START_COLUMN
from .scores import SCORES

WHOLE = 30.0  # seconds: up to here, a recording is one row


def label_rows(
    dataset: datasets.Dataset, labels: Mapping[int, dict[str, Any]], audio_column: str, text_column: str
) -> datasets.Dataset:
    """
    One row for each short recording, and one for each segment of a longer one, see [`pseudo_label`].

    Args:
        dataset (`datasets.Dataset`): The recordings, undecoded.
        labels (`Mapping[int, dict]`): Row to its label, with text.
        audio_column (`str`): Column of audio.
        text_column (`str`): Column of given transcripts, if there is one.
    """
    rows = [one for row, label in labels.items() for one in _rows_of(row, label)]
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


def _rows_of(row: int, label: dict[str, Any]) -> list[dict[str, Any]]:
    segments = label["segments"]
    if label["seconds"] <= WHOLE:
        # A whole recording is as sure as its tokens on average, and as doubtful as its worst window.
        lengths = [max(len(segment["text"]), 1) for segment in segments]
        means = [segment["log_probability"] for segment in segments]
        whole = {
            TEXT_COLUMN: label["text"],
            START_COLUMN: None,
            END_COLUMN: None,
            "seconds": label["seconds"],
            "log_probability": sum(a * b for a, b in zip(lengths, means, strict=True)) / sum(lengths),
            **{name: max(segment[name] for segment in segments) for name in SCORES[1:]},
        }
        parts = [whole]
    else:
        parts = [
            {
                TEXT_COLUMN: segment["text"].strip(),
                START_COLUMN: segment["start"],
                END_COLUMN: segment["end"],
                "seconds": segment["end"] - segment["start"],
                **{name: segment[name] for name in SCORES},
            }
            for segment in segments
        ]
    return [{**part, "wer": label.get("wer"), "recording": row} for part in parts]
