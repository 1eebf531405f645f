"""The file of tokens that teachers predict; see `teachers`."""

from __future__ import annotations

from benchmarks.comparison.store import ResultStore
from benchmarks.result_lines import Results

RECORDINGS = 60  # the first of the student's training, and of the test
KEYS = ("teacher", "language", "fold", "run", "split")
SPLITS = ("train", "test")  # what it teaches, and what its student is tested on


def results_of(store: ResultStore) -> Results:
    """The file of measurements."""
    return Results(store.table_dir / "teachers.jsonl", KEYS)
