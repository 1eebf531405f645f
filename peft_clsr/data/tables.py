from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas as pd

from ..languages import language_code

CONVERTED = "refs/convert/parquet"


def load_recordings(name, split, language, *, config=None, revision=None, audio_column="audio", limit=None):
    """
    Recordings and transcripts of one language, from the Hub or from a folder.

    Raises:
        ValueError: there is no such dataset or split, or no row of the language.
    """
    folder = Path(name, config or "")
    tables = {path.parent.name: path for path in folder.glob("*/metadata.csv")}
    tables |= {path.stem: path for path in folder.glob("*.tsv")}
    if split in tables:
        return _read_table(tables[split], audio_column, language, limit)
    if tables:
        raise ValueError(
            f"{folder} has neither {split}/metadata.csv nor {split}.tsv, but has {', '.join(sorted(tables))}: set "
            "--train_split and --eval_split to two of these"
        )
    where: dict[str, Any] = {"path": name, "name": config}
    if folder.is_dir():
        where = {"path": str(folder)}
    elif revision == CONVERTED:
        where = {"path": name, "data_dir": config}
    try:
        dataset = datasets.load_dataset(**where, split=split, revision=revision)
    # A RuntimeError: the dataset is a script, which datasets 4 and later do not run.
    except (datasets.exceptions.DatasetsError, ConnectionError, FileNotFoundError, RuntimeError, ValueError) as error:
        hint = f"; of a script, --dataset_revision {CONVERTED} may have the data" * isinstance(error, RuntimeError)
        raise ValueError(
            f"no split {split!r} of dataset {str(folder)!r} ({error}): expected a folder with {split}/metadata.csv, "
            f"one with {split}.tsv and clips/, or what datasets.load_dataset reads, here or on the Hub; check "
            f"--dataset, --dataset_config, --train_split and --eval_split{hint}"
        ) from error
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def _read_table(table: Path, audio_column, language: str, limit: int | None) -> datasets.Dataset:
    """The rows of a language in `train/metadata.csv`, or in Common Voice's `train.tsv`, with their recordings."""
    if table.suffix == ".csv":
        column, folder, dialect = "file_name", table.parent, {}
    else:
        column, folder, dialect = "path", table.parent / "clips", {"sep": "\t", "quoting": csv.QUOTE_NONE}
    # Text stays text: a transcript may well be "null" or "12".
    rows = pd.read_csv(table, dtype=str, keep_default_na=False, **dialect).fillna("")
    if column not in rows or rows.empty:
        raise ValueError(f"{table} has {len(rows)} rows of {', '.join(rows)}; expected some, with a column {column!r}")
    if "language" in rows:
        names = sorted(rows["language"].unique())
        try:
            codes = {name: language_code(name) for name in names}
        except ValueError as error:
            raise ValueError(f"{table}, column 'language': {error}") from error
        rows = rows[rows["language"].map(codes) == language]
        if rows.empty:
            raise ValueError(f"{table} has no row of language {language!r}; it has {names}")
    rows = rows[:limit].copy()
    files = [folder / name for name in rows[column]]
    rows[audio_column] = [str(file) for file in files]
    # Features are kept by datasets until a row changes: a recording that was replaced must change its row.
    rows["modified"] = [str(file.stat().st_mtime_ns) if file.is_file() else "" for file in files]
    # A generator's rows are on the disk, and so are the features made of them; from_pandas has both in memory.
    return datasets.Dataset.from_generator(
        _each_row,
        features=datasets.Features({name: datasets.Value("string") for name in rows}),
        gen_kwargs={"rows": rows.to_dict("records")},
    )


def _each_row(rows: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    yield from rows
