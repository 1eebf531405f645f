"""Recordings listed in tables (`metadata.csv`, Common Voice's `train.tsv`), or read by `datasets.load_dataset`."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import require
from ..languages import language_code

if TYPE_CHECKING:
    import datasets

# The branch where the Hub keeps its Parquet conversion of a dataset: one folder a configuration, no configurations.
CONVERTED = "refs/convert/parquet"


def read_table(path: str | Path) -> list[dict[str, Any]]:
    """
    Read a table of recordings. Every cell is text: a transcript may be "null" or "12".

    Args:
        path (`str` or `Path`):
            A `.tsv` as in an archive of Common Voice (column `path`, relative to the folder `clips` beside the table;
            no quoting), else a CSV file (column `file_name`, relative to the table).

    Returns:
        `list[dict]`: the columns of each row, as `str`; besides, `file` is the `Path` of the recording, absolute if
        `path` is, and `language` is Whisper's code, or `None` where the cell is empty or the table has no such column.

    Raises:
        ValueError: the table cannot be parsed, a row has no file name, or a language is unknown.
        OSError: the table cannot be opened.

    Example:

    ```py
    >>> read_table("recordings/train/metadata.csv")[0]
    {'file_name': '0.wav', 'transcription': 'Bon dia', 'language': 'ca', 'file': PosixPath('recordings/train/0.wav')}
    ```
    """
    path = Path(path)
    dialect: dict[str, Any]
    if path.suffix.lower() == ".tsv":
        column, folder, dialect = "path", path.parent / "clips", {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    else:
        column, folder, dialect = "file_name", path.parent, {}
    codes: dict[str, str | None] = {"": None}
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restval="", **dialect)
        try:
            for row in reader:
                if None in row:
                    raise ValueError(f"a row with more than the {len(reader.fieldnames)} columns of the header")
                if not row.get(column):
                    columns = ", ".join(map(repr, reader.fieldnames))
                    raise ValueError(f"a row without {column}: expected that column in every row; there are {columns}")
                language = row.get("language", "")
                if language not in codes:
                    codes[language] = language_code(language)
                rows.append({**row, "language": codes[language], "file": folder / row[column]})
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read after line {reader.line_num}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    return rows


def load_recordings(
    dataset: str | Path,
    language: str,
    split: str = "train",
    *,
    config: str | None = None,
    revision: str | None = None,
    audio_column: str = "audio",
    limit: int | None = None,
) -> datasets.Dataset:
    """
    Load the recordings and transcripts of one language, from a folder or from the Hub.

    Args:
        dataset (`str` or `Path`):
            A folder with a table for each split, `train/metadata.csv` or `train.tsv` (see [`read_table`]); another
            folder that `datasets.load_dataset` reads, such as one of Parquet files; or a Hub id.
        language (`str`):
            Name or code. A table with a column `language` gives its rows of this language. Everything else gives all
            rows: choose the language by `config`.
        split (`str`, *optional*, defaults to `"train"`): Name of the split.
        config (`str`, *optional*): Configuration on the Hub, or subfolder of the folder.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub. `"refs/convert/parquet"` loads a dataset that is a script.
        audio_column (`str`, *optional*, defaults to `"audio"`): Name of the column of paths that a table gets.
        limit (`int`, *optional*): Load the first so many rows.

    Returns:
        `datasets.Dataset`: the rows. Those of a table lie on the disk and have all its columns, the path of the
        recording in `audio_column`, and `modified`, the time of its last change.

    Raises:
        ValueError: there is no such dataset or split, a table is empty or has no row of the language.
    """
    code = language_code(language)
    folder = Path(dataset, config or "")
    tables = {path.parent.name: path for path in folder.glob("*/metadata.csv")}
    tables |= {path.stem: path for path in folder.glob("*.tsv")}
    if split in tables:
        return _dataset_of_table(_rows_of_language(tables[split], code)[:limit], audio_column)
    if tables:
        raise ValueError(
            f"{folder} has neither {split}/metadata.csv nor {split}.tsv, but has {', '.join(sorted(tables))}: choose "
            "one of these as the split"
        )
    rows = _load_dataset(str(dataset), folder, split, config, revision)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _rows_of_language(table: Path, code: str) -> list[dict[str, Any]]:
    """The rows of a table that are in a language; all where the table names no language."""
    rows = read_table(table)
    if not rows:
        raise ValueError(f"{table} has no rows")
    codes = {row["language"] for row in rows}
    if codes == {None}:
        return rows
    if None in codes:
        number = next(index for index, row in enumerate(rows, start=1) if row["language"] is None)
        raise ValueError(f"{table}, column 'language': row {number} is empty; fill the column, or remove it")
    rows = [row for row in rows if row["language"] == code]
    if not rows:
        raise ValueError(f"{table} has no row of language {code!r}; it has {sorted(codes)}")
    return rows


def _dataset_of_table(rows: list[dict[str, Any]], audio_column: str) -> datasets.Dataset:
    datasets = require("datasets")
    cells = []
    for row in rows:
        file = row["file"]
        # `datasets` reuses features until a row changes, so a replaced recording must change its row.
        modified = str(file.stat().st_mtime_ns) if file.is_file() else ""
        others = {column: cell for column, cell in row.items() if column != "file" and cell is not None}
        cells.append({**others, audio_column: str(file), "modified": modified})
    # A generator's rows are on the disk, and so are features made of them. Dataset.from_list keeps both in memory.
    return datasets.Dataset.from_generator(
        _each_row,
        features=datasets.Features({column: datasets.Value("string") for column in cells[0]}),
        gen_kwargs={"rows": cells},
    )


def _each_row(rows: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    yield from rows


def _load_dataset(dataset: str, folder: Path, split: str, config: str | None, revision: str | None) -> Any:
    datasets = require("datasets")
    source: dict[str, Any] = {"path": dataset, "name": config}
    if folder.is_dir():
        source = {"path": str(folder)}
    elif revision == CONVERTED:
        source = {"path": dataset, "data_dir": config}
    try:
        return datasets.load_dataset(**source, split=split, revision=revision)
    # RuntimeError: the dataset is a script, which datasets 4 and later do not run.
    except (datasets.exceptions.DatasetsError, ConnectionError, FileNotFoundError, RuntimeError, ValueError) as error:
        hint = f"; the data of a script may be at revision {CONVERTED}" if isinstance(error, RuntimeError) else ""
        raise ValueError(
            f"no split {split!r} of dataset {str(folder)!r} ({error}): expected a folder with {split}/metadata.csv, "
            f"one with {split}.tsv and clips/, or what datasets.load_dataset reads, here or on the Hub; check the "
            f"names of dataset, configuration and split{hint}"
        ) from error
