"""Finds the recordings of a split in a folder: in tables of its own, in one table of all, or in pairs of files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .encodings import decode_text
from .split import PARTS
from .table_files import NO_AUDIO, read_recordings
from .table_reader import TABLE_SUFFIXES, Table, log_once

# Folders and tables of these names are splits.
_SPLITS = {*PARTS, "dev", "valid", "val", "eval"}
_COMMON_VOICE = {"validated", "invalidated", "other", "reported"}


def read_layout(
    source: Path, split: str, language: str, text_column: str, file_columns: Sequence[str]
) -> tuple[Table, bool] | None:
    """
    Read the recordings of a split, in all languages.

    Args:
        source (`Path`):
            A table, or a folder with one of these, in this order: a table for the split, `train/metadata.csv` or
            `train.csv`; a table of all, `metadata.csv`, or another that is the only one; pairs of a recording and its
            text, `0.wav` and `0.txt`. Each table may also be a tsv or a jsonl.
        split (`str`): "train", "test", or another name of a split.
        language (`str`): Tag of the language of the texts, for files that are not in UTF-8.
        text_column (`str`): Column for the texts of pairs.
        file_columns (`Sequence[str]`): Columns of file names; the first that a table has is read.

    Returns:
        `(Table, bool)` or `None`: the rows, and True if they are of all splits, as nothing says which. `None` if there
        are neither tables nor pairs.

    Raises:
        ValueError: a table or text cannot be read, or there is no such split.
        OSError: a file cannot be opened.
    """
    if source.is_file():  # of any ending: Excel's "Unicode text" is a .txt with tabs
        return _rows_of_split(read_recordings(source, language, file_columns), source.parent, split)
    if not source.is_dir():
        return None
    tables, whole = _tables(source)
    table = tables.get(split) or tables.get(split.casefold())
    if table is not None:
        return read_recordings(table, language, file_columns), False
    if whole is not None and not tables.keys() & _SPLITS:
        return _rows_of_split(read_recordings(whole, language, file_columns), source, split)
    if _has_parquet(source):  # tables beside Parquet files are about something else
        return None
    if tables:
        hint = "; --dataset_config {language} reads the folder of each language" if language in tables else ""
        raise ValueError(
            f"{source} has neither {split}/metadata.csv nor {split}.tsv, but has {', '.join(sorted(tables))}: set "
            f"the split (--train_split, --eval_split) to one of these{hint}"
        )
    pairs = _read_pairs(source, language, text_column)
    return None if pairs is None else _rows_of_split(pairs, source, split)


def _tables(folder: Path) -> tuple[dict[str, Path], Path | None]:
    """The tables of splits by their names, and the table of all."""
    tables: dict[str, Path] = {}
    whole: dict[str, Path] = {}
    candidates = (path for pattern in ("*", "*/metadata.*") for path in folder.glob(pattern))
    for path in sorted(path for path in candidates if path.suffix.lower() in TABLE_SUFFIXES and path.is_file()):
        if path.name.startswith((".", "~")):  # the lock of a file that a spreadsheet has open
            continue
        name = path.stem if path.parent == folder else path.parent.name
        name = name.casefold() if name.casefold() in _SPLITS else name
        is_whole = path.parent == folder and name.lower() == "metadata"
        other = (whole if is_whole else tables).setdefault("metadata" if is_whole else name, path)
        if other != path and (is_whole or name in _SPLITS):
            raise ValueError(f"{other} and {path} are both tables of the same recordings: keep one of them")
    if not whole and len(tables) == 1 and not _has_parquet(folder):
        name, path = next(iter(tables.items()))
        if path.parent == folder and name not in _SPLITS | _COMMON_VOICE:
            return {}, path
    return tables, next(iter(whole.values()), None)


def _has_parquet(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in ("*.parquet", "*/*.parquet"))


def _rows_of_split(table: Table, folder: Path, split: str) -> tuple[Table, bool]:
    """The rows of a split, by the column `split` or the folders of the recordings; else all rows, and `True`."""
    if table.rename("split"):
        names = [row["split"].strip() for row in table.rows]
    else:
        names = [_split_folder(file, folder, split) for file in table.files]
        if not any(names):
            return table, True
    rows = [row for row, name in enumerate(names) if name.casefold() == split.casefold()]
    if not rows:
        raise ValueError(
            f"{table.path} has no row of split {split!r}, but has "
            f"{', '.join(f'{count} of {name!r}' for name, count in Counter(names).items())}: set the split "
            "(--train_split, --eval_split) to one of these"
        )
    if "" in names:
        log_once(
            f"{table.path}: {names.count('')} of {len(names)} rows are in no split, and not used (the first: "
            f"{table.place(names.index(''))})"
        )
    return table.select(rows), False


def _split_folder(file: Path, folder: Path, split: str) -> str:
    """The folder of a recording that is named as a split, or an empty text."""
    above, names = folder.parts, file.parts[:-1]
    if names[: len(above)] != above:
        return ""
    return next((name for name in names[len(above) :] if name.casefold() in _SPLITS | {split.casefold()}), "")


def _read_pairs(folder: Path, language: str, text_column: str) -> Table | None:
    """Recordings with a text file of the same name beside each."""
    pairs: list[tuple[Path, Path]] = []
    lonely: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
        texts = {file.stem: file for file in visible if file.suffix.lower() == ".txt"}
        audio: dict[str, Path] = {}
        for file in visible:
            if file.suffix.lower() in NO_AUDIO:
                continue
            other = audio.setdefault(file.stem, file)
            if other != file and file.stem in texts:
                raise ValueError(f"{texts[file.stem]} is the text of {other} and of {file}: rename or remove one")
        pairs += [(file, texts[stem]) for stem, file in audio.items() if stem in texts]
        lonely += [file for stem, file in audio.items() if stem not in texts]
    if not pairs:
        return None
    endings = {file.suffix.lower() for file, _ in pairs}
    lonely = [file for file in lonely if file.suffix.lower() in endings]
    if lonely:
        log_once(f"{folder}: {len(lonely)} recordings have no text file, and are not used (the first: {lonely[0]})")
    rows = []
    announced = False
    for file, path in pairs:
        text, encoding = decode_text(path.read_bytes(), str(path), language)
        if encoding != "utf-8" and not announced:
            log_once(f"{path} and other texts of {folder} are not in UTF-8. It is read as {encoding}: {text[:80]!r}")
            announced = True
        rows.append({"file_name": str(file), text_column: " ".join(text.split())})
    files, places = [file for file, _ in pairs], [path for _, path in pairs]
    return Table(folder, ["file_name", text_column], rows, places, files)
