"""Recordings and transcripts from tables (metadata.csv, Common Voice's tsv), folders of Parquet files, and the Hub."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import require
from ..languages import language_code

if TYPE_CHECKING:
    import datasets

# The Hub's branch with its Parquet conversion of a dataset: a folder for each configuration.
CONVERTED_REVISION = "refs/convert/parquet"


def read_table(path: str | Path) -> list[tuple[Path, dict[str, str]]]:
    """
    Read a table of recordings.

    Args:
        path (`str` or `Path`):
            A `metadata.csv`, whose column `file_name` is relative to its folder, or a tsv of Common Voice, whose
            column `path` is relative to the folder `clips` beside it.

    Returns:
        `list[tuple[Path, dict[str, str]]]`: for each row, the path of the recording and the cells by column. All cells
        are text, as a transcript may be "null" or "12".

    Raises:
        ValueError:
            There is no row, no column of paths, or a row with more cells than columns, or the file is not in UTF-8.
        OSError: the file cannot be opened.

    Example:

    ```py
    >>> read_table("recordings/train/metadata.csv")[0]
    (PosixPath('recordings/train/0.wav'), {'file_name': '0.wav', 'transcription': 'Bon dia', 'language': 'ca'})
    ```
    """
    path = Path(path)
    dialect: dict[str, Any] = {}
    column, folder = "file_name", path.parent
    if path.suffix.lower() == ".tsv":
        column, folder, dialect = "path", path.parent / "clips", {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restval="", **dialect)
        rows = []
        try:
            columns = list(reader.fieldnames or [])
            for row in reader:
                if None in row:
                    raise ValueError(
                        f"{path}, line {reader.line_num} has more cells than the {len(columns)} columns: quote text "
                        "that has commas"
                    )
                rows.append((folder / row.get(column, ""), row))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read after line {reader.line_num}: {error}") from error
    if not rows or column not in columns:
        raise ValueError(
            f"{path} has {len(rows)} rows of {', '.join(columns)}; expected some, with a column {column!r}"
        )
    return rows


def load_recordings(
    dataset: str | Path,
    language: str,
    split: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    audio_column: str = "audio",
    limit: int | None = None,
) -> datasets.Dataset:
    """
    Load recordings and transcripts of one language, from a folder or from the Hub, for [`prepare_dataset`].

    Args:
        dataset (`str` or `Path`):
            A folder with `train/metadata.csv` and `test/metadata.csv`, or with `train.tsv`, `test.tsv` and `clips/` as
            in Common Voice's archives, or a folder or Hub id that `datasets.load_dataset` reads. `{language}` in it
            stands for the language's code.
        language (`str`): Name or code. A table with a column `language` gives only the rows of this language.
        split (`str`): "train", "test", or another name of a folder, table or split.
        config (`str`, *optional*): Configuration on the Hub, or a subfolder.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        audio_column (`str`, *optional*, defaults to `"audio"`): Column for the paths of recordings in a table.
        limit (`int`, *optional*): Load only the first rows.

    Returns:
        `datasets.Dataset`: one row a recording, with the columns of the table or dataset.

    Raises:
        ValueError: there is no such dataset or split, or no row of the language.

    Example:

    ```py
    >>> recordings = load_recordings("my_recordings", "ca", "train")
    >>> train_set, counts = prepare_dataset(recordings, processor, "ca")
    ```
    """
    datasets = require("datasets")
    code = language_code(language)
    name = str(dataset).replace("{language}", code)
    folder = Path(name, config or "")
    tables = {path.parent.name: path for path in folder.glob("*/metadata.csv")}
    tables |= {path.stem: path for path in folder.glob("*.tsv")}
    if split in tables:
        return _table_dataset(tables[split], code, audio_column, limit)
    if tables:
        raise ValueError(
            f"{folder} has neither {split}/metadata.csv nor {split}.tsv, but has {', '.join(sorted(tables))}: set "
            "the split (--train_split, --eval_split) to one of these"
        )
    source: dict[str, Any] = {"path": name, "name": config}
    if folder.is_dir():
        source = {"path": str(folder)}
    elif revision == CONVERTED_REVISION:
        source = {"path": name, "data_dir": config}
    try:
        loaded = datasets.load_dataset(**source, split=split, revision=revision)
    # A RuntimeError: the dataset is a script, which datasets 4 and later do not run.
    except (datasets.exceptions.DatasetsError, ConnectionError, FileNotFoundError, RuntimeError, ValueError) as error:
        hint = ""
        if isinstance(error, RuntimeError):
            hint = f"; if it is a script, try another revision, --dataset_revision {CONVERTED_REVISION}"
        raise ValueError(
            f"no split {split!r} of dataset {str(folder)!r} ({error}): expected a folder with {split}/metadata.csv, "
            f"one with {split}.tsv and clips/, or a dataset that datasets.load_dataset reads, here or on the Hub; "
            "check the names of the dataset, its configuration (--dataset_config) and its splits (--train_split, "
            f"--eval_split){hint}"
        ) from error
    return loaded if limit is None else loaded.select(range(min(limit, len(loaded))))


def _table_dataset(table: Path, code: str, audio_column: str, limit: int | None) -> datasets.Dataset:
    """The rows of one language in a table, with the paths of their recordings."""
    datasets = require("datasets")
    rows = read_table(table)
    if "language" in rows[0][1]:
        names = sorted({row["language"] for _, row in rows})
        try:
            codes = {name: language_code(name) for name in names}
        except ValueError as error:
            raise ValueError(f"{table}, column 'language': {error}") from error
        rows = [(file, row) for file, row in rows if codes[row["language"]] == code]
        if not rows:
            raise ValueError(f"{table} has no row of language {code!r}; it has {names}")
    # datasets caches features until a row changes, so a recording that was replaced must change its row.
    cells = [
        {**row, audio_column: str(file), "modified": str(file.stat().st_mtime_ns) if file.is_file() else ""}
        for file, row in rows[:limit]
    ]
    # A generator's rows are on disk, and so are the features made from them. from_list would keep both in memory.
    return datasets.Dataset.from_generator(
        _each_row,
        features=datasets.Features({name: datasets.Value("string") for name in cells[0]}),
        gen_kwargs={"rows": cells},
    )


def _each_row(rows: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    yield from rows
