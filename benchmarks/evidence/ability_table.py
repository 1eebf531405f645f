"""
The abilities that trainings changed, on disk: a row for each run in `abilities.csv`, beside `runs.csv`.

A line for each run in `abilities.jsonl.gz` has what the row's scores follow from, by utterance. `KEY` joins the files,
and with them the rows of `runs.csv`. Until a run is collected, it has `abilities.json` in its folder of the work.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparison.errors import evaluation_of
from benchmarks.comparison.runs import Run, settings_hash
from benchmarks.comparison.store import ResultStore, encode_cell, write_bytes

# The scores that `abilities.py` measures of a run, by part:
#   "other": "language", "identical" (`None` for a method without experts), "utterances" as in `errors`;
#   "translation", "shared_decoder": n-grams of chrF [recordings, 18]; the second of experts alone;
#   "times": the error in time of each utterance in seconds, `None` if there were no segments; "seconds".
Abilities = dict[str, Any]

TABLE, DETAILS = "abilities.csv", "abilities.jsonl.gz"
KEY = ("language", "method", "seed", "settings_hash")
SCORES = ("other_language", "other_wer", "other_identical", "translation_chrf", "shared_decoder_chrf", "on_time")
COLUMNS = (*KEY, "fold", *SCORES, "median_time_error", "seconds")
NEAR = 0.5  # seconds, as in `peft_clsr.evaluation.times`
ORDERS, BETA = 6, 2  # chrF's n-grams of characters, and how much recall counts


def chrf(statistics: np.ndarray) -> np.ndarray:
    """
    The chrF of sacrebleu, of many sums at once.

    Args:
        statistics (`np.ndarray`): sums over recordings [..., 18]: for n-grams of 1 to 6 characters those of the
            translation, those of the reference, and those of both.

    Returns:
        `np.ndarray`: [...], from 0 to 1.
    """
    parts = np.asarray(statistics, dtype=float).reshape(*statistics.shape[:-1], ORDERS, 3)
    ours, theirs, both = np.moveaxis(parts, -1, 0)
    counted = (ours > 0) & (theirs > 0)
    orders = np.maximum(counted.sum(axis=-1), 1)
    precision, recall = (
        np.where(counted, both / np.maximum(units, 1), 0).sum(axis=-1) / orders for units in (ours, theirs)
    )
    return (1 + BETA**2) * precision * recall / np.maximum(BETA**2 * precision + recall, 1e-16)


def on_time(times: Iterable[float | None]) -> np.ndarray:
    """Integers [utterances, 2]: 1 if it is within 0.5 s, and 1."""
    return np.array([[error is not None and error <= NEAR, 1] for error in times], dtype=np.int64)


def scores(abilities: Abilities) -> dict[str, Any]:
    """The scores of a run: columns of the table. Fractions from 0 to 1, and seconds."""
    other, times = abilities["other"], abilities["times"]
    found = {
        "other_language": other["language"],
        "other_wer": evaluation_of(other["utterances"])["wer"],
        "other_identical": other["identical"],
        "translation_chrf": float(chrf(np.sum(abilities["translation"], axis=0))),
        "on_time": float(on_time(times)[:, 0].mean()),
        "seconds": abilities["seconds"],
    }
    if "shared_decoder" in abilities:
        found["shared_decoder_chrf"] = float(chrf(np.sum(abilities["shared_decoder"], axis=0)))
    median = float(np.median([np.inf if error is None else error for error in times]))
    return found | {"median_time_error": median if np.isfinite(median) else None}


class AbilityTable:
    """
    The abilities of one student's runs.

    Args:
        store (`ResultStore`): Of the runs.
    """

    def __init__(self, store: ResultStore) -> None:
        self.store = store

    def file(self, run: Run) -> Path:
        """Where a run's abilities are written."""
        return self.store.results_file(run).with_name("abilities.json")

    def write(self, run: Run, abilities: Abilities) -> None:
        """Writes the abilities of a run to its folder. `collect` puts them into the table."""
        write_bytes(self.file(run), (json.dumps(abilities, allow_nan=False) + "\n").encode())

    def read(self) -> dict[tuple[str, ...], Abilities]:
        """Those of the table, by `key_of`. Empty if there is no table."""
        path = self.store.table_dir / DETAILS
        lines = gzip.decompress(path.read_bytes()).decode().splitlines() if path.exists() else []
        return {tuple(str(entry[name]) for name in KEY): entry for entry in map(json.loads, lines)}

    def collect(self, runs: Iterable[Run]) -> None:
        """Moves the abilities of runs from their folders into the table. A row of the same run is replaced."""
        finished = {run: self.file(run) for run in runs if self.file(run).exists()}
        if not finished:
            return
        table = self.read()
        for run, path in finished.items():
            key = key_of(run)
            entry = {name: getattr(run, name, key[-1]) for name in (*KEY, "fold")}
            table[key] = entry | json.loads(path.read_text(encoding="utf-8"))
        self._write(table)
        for path in finished.values():  # after the table, so that nothing is lost if this stops here
            path.unlink()

    def _write(self, table: Mapping[tuple[str, ...], Abilities]) -> None:
        text, lines = io.StringIO(), ""
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for key in sorted(table):
            entry = table[key]
            values = {name: entry[name] for name in (*KEY, "fold")} | scores(entry)
            values = {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}
            writer.writerow({name: encode_cell(value) for name, value in values.items()})
            lines += json.dumps(entry, allow_nan=False, separators=(",", ":")) + "\n"
        write_bytes(self.store.table_dir / DETAILS, gzip.compress(lines.encode(), mtime=0))  # first: `read` reads it
        write_bytes(self.store.table_dir / TABLE, text.getvalue().encode())


def key_of(run: Run) -> tuple[str, ...]:
    return run.language, run.method, str(run.seed), settings_hash(vars(run))
