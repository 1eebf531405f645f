"""Finds the recordings of a split in a folder: in tables of its own, in one table of all, or in pairs of files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .encodings import decode_text
from .segments import END_COLUMN, START_COLUMN
from .split import PARTS, MissingSplitError
from .subtitle_files import TIMED_ENDINGS, files_by_name, find_beside, find_timed_texts, read_timed_texts
from .table_files import AUDIO_SUFFIXES, NO_AUDIO, name_key, read_recordings
from .table_reader import TABLE_SUFFIXES, Table, join_tables, log_once

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
            text, `0.wav` and `0.txt`, or with times `0.srt`, `0.vtt` or `0.TextGrid`. Each table may also be a tsv or
            a jsonl.
        split (`str`): "train", "test", or another name of a split.
        language (`str`): Tag of the language of the texts, for files that are not in UTF-8.
        text_column (`str`): Column for the texts of pairs.
        file_columns (`Sequence[str]`): Columns of file names; the first that a table has is read.

    Returns:
        `(Table, bool)` or `None`: the rows, and True if they are of all splits, as nothing says which. `None` if there
        are neither tables nor pairs.

    Raises:
        MissingSplitError: there is no such split.
        ValueError: a table or text cannot be read.
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
        raise MissingSplitError(
            f"{source} has neither {split}/metadata.csv nor {split}.tsv, but has {', '.join(sorted(tables))}: set "
            f"the split (--train_split, --eval_split, --validation_split) to one of these{hint}"
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
        raise MissingSplitError(
            f"{table.path} has no row of split {split!r}, but has "
            f"{', '.join(f'{count} of {name!r}' for name, count in Counter(names).items())}: set the split "
            "(--train_split, --eval_split, --validation_split) to one of these"
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
    """Recordings with a text file of the same name beside each, with or without times."""
    pairs: list[tuple[Path, Path]] = []
    several: list[list[Path]] = []
    without_text: list[Path] = []
    without_audio: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
        beside = files_by_name(visible)
        audio = [file for file in visible if file.suffix.lower() not in NO_AUDIO]
        by_text: dict[Path, Path] = {}
        for file in audio:
            timed = find_timed_texts(file, language, beside)
            several += [timed] if len(timed) > 1 else []
            text_file = timed[0] if timed else find_beside(f"{file.stem}.txt", beside)
            if text_file is None:
                without_text.append(file)
            elif by_text.setdefault(text_file, file) != file:
                raise ValueError(
                    f"{text_file} is the text of {by_text[text_file]} and of {file}: rename or remove one"
                )
        pairs += [(file, text_file) for text_file, file in by_text.items()]
        heard = {name_key(file.stem) for file in audio}
        without_audio += [
            file
            for file in visible
            if file.suffix.lower() in {".txt", *TIMED_ENDINGS}
            # Also "talk.en.srt" is of "talk.wav".
            and heard.isdisjoint({name_key(file.stem), name_key(Path(file.stem).stem)})
        ]
    if not pairs:
        return None
    endings = AUDIO_SUFFIXES | {file.suffix.lower() for file, _ in pairs}
    without_text = [file for file in without_text if file.suffix.lower() in endings]
    for files, problem in (
        (without_text, "recordings have no text file"),
        (without_audio, "text files have no recording"),
    ):
        if files:
            some = ", ".join(str(file.relative_to(folder)) for file in files[:3]) + (", ..." if files[3:] else "")
            log_once(f"{folder}: {len(files)} {problem} of the same name, and are not used: {some}")
    if several:
        read, *others = several[0]
        log_once(
            f"{folder}: {len(several)} recordings have several files with times; one is read (such as {read}, not "
            f"{', '.join(map(str, others))})"
        )
    rows = []
    announced = False
    for file, path in pairs:
        row = Table(folder, ["file_name", text_column], [{"file_name": str(file), text_column: ""}], [path], [file])
        if path.suffix.lower() in TIMED_ENDINGS:
            row = _add_times(row, path, text_column, language)
        else:
            text, encoding = decode_text(path.read_bytes(), str(path), language)
            if encoding != "utf-8" and not announced:
                log_once(
                    f"{path} and other texts of {folder} are not in UTF-8. It is read as {encoding}: {text[:80]!r}"
                )
                announced = True
            row.rows[0][text_column] = " ".join(text.split())
        rows.append(row)
    table = join_tables(folder, rows)
    if not table.rows:
        raise ValueError(f"{folder} has {len(pairs)} recordings with a text file each, but all of these are empty")
    return table


def read_texts_beside(table: Table, text_column: str, language: str) -> Table:
    """
    Read the files with times beside recordings, for rows that have neither text nor times.

    Args:
        table ([`Table`]): Its rows of other recordings are kept as they are.
        text_column (`str`): Column for the texts.
        language (`str`): Code of their language.
    """
    found = []
    first, columns = 0, (text_column, START_COLUMN, END_COLUMN)
    folders: dict[Path, dict[str, Path]] = {}
    for number, (row, file) in enumerate(zip(table.rows, table.files, strict=True)):
        if any(row.get(column, "").strip() for column in columns):
            continue
        if file.parent not in folders:
            folders[file.parent] = files_by_name([*file.parent.iterdir()]) if file.parent.is_dir() else {}
        timed = find_timed_texts(file, language, folders[file.parent])
        if timed:
            one = _add_times(table.select([number]), timed[0], text_column, language)
            found += [table.select(range(first, number)), one]
            first = number + 1
    return join_tables(table.path, [*found, table.select(range(first, len(table.rows)))]) if found else table


def _add_times(row: Table, path: Path, text_column: str, language: str) -> Table:
    """A table of one recording, with a row for each text in its file with times."""
    texts = read_timed_texts(path, text_column, language)
    if not texts:
        log_once(f"{path} has no text, so {row.files[0]} is not used")
    columns = list(dict.fromkeys([*row.columns, text_column, START_COLUMN, END_COLUMN]))
    rows = [{**row.rows[0], text_column: text.text, START_COLUMN: text.start, END_COLUMN: text.end} for text in texts]
    return Table(row.path, columns, rows, [text.place for text in texts], row.files * len(texts))
