"""
The results of all finished runs of a base model, in two files of one folder.

`runs.csv` has a row for each run: its key, error rates, cost, settings and machine. `utterances.jsonl.gz` has a line
for each run: the errors of each utterance, gates, and the log of the training. The key is study, language, method,
teacher, seed, and a hash of all other settings.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RUNS_NAME, UTTERANCES_NAME = "runs.csv", "utterances.jsonl.gz"
STUDY = "short-context"  # the first round: contexts of 3 s
KEY = ("study", "language", "method", "teacher", "seed", "settings_hash")
RATES = tuple(f"{rate}_{split}" for split in ("validation", "test", "out_of_domain") for rate in ("wer", "cer"))
COSTS = ("train_utterances", "train_steps", "train_seconds", "trained_parameters", "seconds")
OBJECTS = ("settings", "machine")
_NOT_HASHED = {"language", "method", "teacher", "seed", "student", "precision"}

Key = tuple[str, ...]


def settings_hash(settings: Mapping[str, Any]) -> str:
    """8 hexadecimal digits that stand for the settings which have no column of their own in the key."""
    hashed = {name: value for name, value in settings.items() if name not in _NOT_HASHED}
    hashed = {name: float(value) if type(value) is int else value for name, value in hashed.items()}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:8]


def key_of(result: Mapping[str, Any]) -> Key:
    """The key of a run, all as text."""
    settings = result["settings"]
    names = (settings["language"], settings["method"], settings.get("teacher") or "", str(settings["seed"]))
    return (STUDY, *names, settings_hash(settings))


def run_name(settings: Mapping[str, Any]) -> str:
    """A short name for a run, and its folder while it is not in the table."""
    teacher = f"-kd-{settings['teacher'].replace('/', '--')}" if settings.get("teacher") else ""
    parts = f"{settings['language']}-{settings['method']}{teacher}-seed{settings['seed']}"
    return f"{parts}-{settings_hash(settings)}"


def read_store(folder: Path) -> dict[Key, dict[str, Any]]:
    """
    Read all runs of a folder. Empty if there is no table.

    Raises:
        ValueError: the two files do not have the same runs.
    """
    if not (folder / RUNS_NAME).exists():
        return {}
    with gzip.open(folder / UTTERANCES_NAME, "rt", encoding="utf-8") as file:
        details = {tuple(line.pop("key")): line for line in map(json.loads, file)}
    results = {}
    with (folder / RUNS_NAME).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            key = tuple(row[name] for name in KEY)
            if key not in details:
                raise ValueError(f"{folder / UTTERANCES_NAME} lacks the run {key}: get both files again")
            scalars = {name: json.loads(row[name]) for name in (*OBJECTS, *COSTS) if row[name]}
            results[key] = {**scalars, **details.pop(key)}
    if details:
        raise ValueError(f"{folder / RUNS_NAME} lacks the run {next(iter(details))}: get both files again")
    return results


def write_store(results: Iterable[Mapping[str, Any]], folder: Path) -> None:
    """Write all runs to a folder, sorted, so that equal runs give equal files. A NaN is an error."""
    by_key = {key_of(result): result for result in results}
    table, lines = io.StringIO(newline=""), []
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*KEY, *RATES, *COSTS, *OBJECTS])
    for key, result in sorted(by_key.items()):
        evaluations = result["evaluations"]
        rates = []
        for column in RATES:
            rate, _, split = column.partition("_")
            rates.append(round(evaluations[split][rate], 6) if split in evaluations else "")
        costs = [json.dumps(result[name]) if name in result else "" for name in COSTS]
        objects = [_dump(result[name]) if name in result else "" for name in OBJECTS]
        writer.writerow([*key, *rates, *costs, *objects])
        details = {name: value for name, value in result.items() if name not in (*COSTS, *OBJECTS)}
        lines.append(_dump({"key": key, **details}) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    # The same bytes for the same runs: no time stamp.
    _replace(folder / UTTERANCES_NAME, gzip.compress("".join(lines).encode(), mtime=0))
    _replace(folder / RUNS_NAME, table.getvalue().encode())


def collect(runs_dir: Path, folder: Path) -> int:
    """
    Add the finished runs `runs_dir/*/results.json` to the store in `folder`.

    Returns:
        `int`: the number of runs in the store.
    """
    results = read_store(folder)
    for path in sorted(runs_dir.glob("*/results.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        results[key_of(result)] = result
    if results:
        write_store(results.values(), folder)
    return len(results)


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _replace(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(content)
    unfinished.replace(path)
