"""
Results of runs, on disk.

A finished run has a row in `RESULTS_DIR/STUDENT/runs.csv` (its settings, cost and error rates) and a line in
`utterances.jsonl.gz` beside it (errors by utterance, gates by module, training log). `KEY` joins the two. Until a run
is collected into these files, its results are in a folder of its own, `WORK_DIR/STUDENT/KEY/results.json`.
"""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock

from .errors import evaluation_of
from .methods import ALL_LANGUAGES
from .runs import Run, run_name, settings_hash

Result = dict[str, Any]  # what a run writes: "settings", "machine", "evaluations", "gates", ...
RunKey = tuple[str, str, int, str]  # language, method, seed, hash of the settings

TABLE, DETAILS = "runs.csv", "utterances.jsonl.gz"
KEY = ("study", "language", "method", "seed", "settings_hash")
SETTINGS = tuple(item.name for item in fields(Run) if item.name not in KEY)
OPTIONAL = {item.name for item in fields(Run) if "None" in item.type}
COSTS = ("train_utterances", "train_steps", "trained_parameters", "train_seconds", "seconds")
RATED_SPLITS = ("validation", "test", "out_of_domain", "joined")
RATES = {f"{split}_{rate}": (split, rate) for split in RATED_SPLITS for rate in ("wer", "cer")}
MACHINE = ("device", "cores", "threads", "torch", "transformers", "peft", "accelerate")
COLUMNS = (*KEY, *SETTINGS, "precision", *RATES, *COSTS, *MACHINE)
TEXT = {"study", "language", "method", "settings_hash", "teacher", "kd_loss", "precision", *MACHINE} - {
    "cores",
    "threads",
}
# Parts of a result whose error rates follow from their utterances, so that only the utterances are stored.
EVALUATIONS = ("evaluations", "untouched", "without_gates")


@dataclass(frozen=True)
class ResultStore:
    """The results of one student's runs, and their weights."""

    results_dir: Path  # of the tables, a folder for each student
    work_dir: Path  # of runs that are not in a table yet, and of weights
    student: str  # name of the base model, such as "whisper-base"

    @property
    def table_dir(self) -> Path:
        return self.results_dir / self.student

    def results_file(self, run: Run) -> Path:
        """Where a run writes its results."""
        return self.work_dir / self.student / run.key / "results.json"

    def weights(self, run: Run) -> Path:
        """Where a run writes the weights that it trained."""
        return self.work_dir / self.student / run.key / "weights.safetensors"

    def trained_file(self, run: Run) -> Path:
        """Where a run writes what it knows after training, until it is measured."""
        return self.work_dir / self.student / run.key / "trained.json"

    def read(self, run: Run) -> Result | None:
        """Returns the results of a run, or `None` if it has none yet."""
        path = self.results_file(run)
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        entry = read_table(self.table_dir).get((run.language, run.method, run.seed, settings_hash(vars(run))))
        return None if entry is None else decode(*entry, self.student)

    def write(self, run: Run, result: Result) -> None:
        """Writes the results of a run to a folder of its own. `collect` puts them into the table."""
        text = json.dumps(without_nan(result), sort_keys=True, allow_nan=False) + "\n"
        write_bytes(self.results_file(run), text.encode())

    def collect(self, studies: Mapping[Run, str]) -> int:
        """
        Move results from the folders of runs into the table. A row of the same run is replaced, and keeps its study.

        Args:
            studies (`Mapping[Run, str]`): The runs to collect, and the study that each was made for. Runs without
                results in a folder are left out.

        Returns:
            `int`: The number of runs collected. If it is 0, no file is written.
        """
        lock = self.work_dir / self.student / "collect.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            finished = {run: study for run, study in studies.items() if self.results_file(run).exists()}
            if finished:
                table = dict(read_table(self.table_dir))
                for run, study in finished.items():
                    result = json.loads(self.results_file(run).read_text(encoding="utf-8"))
                    row, line = encode(result, study)
                    key = key_of(row)
                    if key in table and table[key][0]["study"] != study:
                        row, line = encode(result, table[key][0]["study"])
                    table[key] = row, line
                write_table(self.table_dir, table.values())
                for run in finished:  # after the table, so that nothing is lost if this stops here
                    self.results_file(run).unlink()
        return len(finished)


def is_measured(result: Result) -> bool:
    """True if the results have the test, and so all splits of their run; tuning measures validation alone."""
    return any(key.endswith("test") for key in result["evaluations"])


def load(results_dir: str | Path) -> list[Result]:
    """
    Load the results of all students' tables.

    Returns:
        `list[dict]`: Results by student and name of the run, each with its "name". The run on all languages together
        is several results, one a language, with "together".

    Raises:
        ValueError: a table does not fit its file of utterances.
    """
    results = []
    for path in sorted(Path(results_dir).glob(f"*/{TABLE}")):
        student = path.parent.name
        rows = [decode(*entry, student) for entry in read_table(path.parent).values()]
        named = [result | {"name": run_name(result["settings"])} for result in rows]
        for result in sorted(named, key=lambda result: result["name"]):
            results += by_language(result)
    return results


def by_language(result: Result) -> list[Result]:
    """
    Split the run on all languages together (its evaluations are "ro test", "bg test", ...) into a result for each.

    Returns:
        `list[dict]`: Any other run as it is.
    """
    if result["settings"]["language"] != ALL_LANGUAGES:
        return [result]
    languages: dict[str, dict[str, Any]] = {}
    for key, rates in result["evaluations"].items():
        language, split = key.split(" ")
        languages.setdefault(language, {})[split] = rates
    together = result | {"together": True}
    return [
        together | {"settings": result["settings"] | {"language": language}, "evaluations": evaluations}
        for language, evaluations in languages.items()
    ]


# ------------------------------------------------------------------------------------------ one result as row and line


def encode(result: Result, study: str) -> tuple[dict[str, str], str]:
    """Turns a result into its row of the table and its line (JSON) of the other file."""
    settings, evaluations = result["settings"], result["evaluations"]
    values = settings | result["machine"] | {name: result[name] for name in COSTS if name in result}
    values |= {"study": study, "settings_hash": settings_hash(settings)}
    for column, (split, rate) in RATES.items():
        if split in evaluations:
            values[column] = round(evaluations[split][rate], 6)
    row = dict.fromkeys(COLUMNS, "") | {name: encode_cell(value) for name, value in values.items()}
    del row["student"]  # the name of the table's folder
    details = {
        name: utterances_alone(part) if name in EVALUATIONS else part
        for name, part in result.items()
        if name not in ("settings", "machine", *COSTS)
    }
    line = json.dumps({name: values[name] for name in KEY} | details, allow_nan=False, separators=(",", ":"))
    return row, line


def decode(row: Mapping[str, str], line: str, student: str) -> Result:
    """
    Turns a row and its line back into the result.

    Raises:
        ValueError: a rate or the hash in the row does not fit the utterances or the settings.
    """
    details = json.loads(line)
    values = {column: decode_cell(column, cell) for column, cell in row.items() if cell or column in OPTIONAL}
    named = [name for name in ("language", "method", "seed", *SETTINGS, "precision") if name in values]
    settings = {name: values[name] for name in named} | {"student": student}
    name = run_name(settings)
    if settings_hash(settings) != row["settings_hash"]:
        raise ValueError(f"{name}: its settings have the hash {settings_hash(settings)}, not {row['settings_hash']}")
    result = {
        part: with_rates(value) if part in EVALUATIONS else value for part, value in details.items() if part not in KEY
    }
    for column, (split, rate) in RATES.items():
        if column in values and abs(values[column] - result["evaluations"][split][rate]) > 1e-6:
            raise ValueError(
                f"{name}: the {rate} of {split!r} is {values[column]:g}, "
                f"but its utterances give {result['evaluations'][split][rate]:.6f}"
            )
    machine = {name: values[name] for name in (*MACHINE, "precision") if name in values}
    result |= {column: values[column] for column in COSTS if column in values}
    result |= {"machine": dict(sorted(machine.items())), "settings": dict(sorted(settings.items()))}
    return dict(sorted(result.items()))


def encode_cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, allow_nan=False)


def decode_cell(column: str, cell: str) -> Any:
    if not cell:
        return None
    return cell if column in TEXT else json.loads(cell)


def utterances_alone(part: Any) -> Any:
    """Replaces each evaluation, at any depth, by its utterances."""
    if not isinstance(part, dict):
        return part
    return part["utterances"] if "utterances" in part else {key: utterances_alone(x) for key, x in part.items()}


def with_rates(part: Any) -> Any:
    """Undoes `utterances_alone`."""
    if isinstance(part, list):
        return evaluation_of(part)
    return {key: with_rates(x) for key, x in part.items()} if isinstance(part, dict) else part


def without_nan(part: Any) -> Any:
    """Replaces numbers that are not finite, which JSON does not have, by `None`."""
    if isinstance(part, dict):
        return {key: without_nan(x) for key, x in part.items()}
    if isinstance(part, list):
        return [without_nan(x) for x in part]
    return None if isinstance(part, float) and not math.isfinite(part) else part


# ----------------------------------------------------------------------------------------------------------- the files


def key_of(row: Mapping[str, str]) -> RunKey:
    return row["language"], row["method"], int(row["seed"]), row["settings_hash"]


def read_table(folder: Path) -> dict[RunKey, tuple[dict[str, str], str]]:
    """
    Read a student's table.

    Returns:
        `dict`: For each run its row and its line. Empty if there is no table.

    Raises:
        ValueError: a run has no line, or several rows.
    """
    if not (folder / TABLE).exists():
        return {}
    return _read_table(folder, (folder / TABLE).stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read_table(folder: Path, modified: int) -> dict[RunKey, tuple[dict[str, str], str]]:
    # Lines without a row are left out: they are of a removed row, or of a write that was stopped between the files.
    lines = {}
    for line in gzip.decompress((folder / DETAILS).read_bytes()).decode().splitlines():
        details = json.loads(line)
        lines[tuple(str(details[name]) for name in KEY)] = line
    table = {}
    with open(folder / TABLE, encoding="utf-8", newline="") as file:
        for read in csv.DictReader(file):
            row = dict.fromkeys(COLUMNS, "") | read  # a table may be older than a setting
            key = key_of(row)
            if key in table:
                raise ValueError(f"{folder / TABLE} has two rows of {' '.join(map(str, key))}: remove one")
            try:
                table[key] = row, lines[tuple(row[name] for name in KEY)]
            except KeyError:
                raise ValueError(f"{folder / DETAILS} has no line of {' '.join(map(str, key))}") from None
    return table


def write_table(folder: Path, entries: Iterable[tuple[dict[str, str], str]]) -> None:
    """Writes a student's table: rows and lines, sorted. The same runs give the same bytes."""
    entries = sorted(entries, key=lambda entry: [entry[0][name] for name in COLUMNS])
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for row, _ in entries)
    lines = "".join(f"{line}\n" for _, line in entries)
    compressed = io.BytesIO()
    with gzip.GzipFile("", "wb", fileobj=compressed, mtime=0) as file:
        file.write(lines.encode())
    write_bytes(folder / DETAILS, compressed.getvalue())  # first: a row without a line is an error
    write_bytes(folder / TABLE, table.getvalue().encode())
    _read_table.cache_clear()  # two writes may have the same time


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_bytes(content)
    unfinished.replace(path)
