"""Finds the recordings that a table names."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from .segments import END_COLUMN, START_COLUMN
from .table_reader import Table, find_column, log_once, read_cells

# Columns of file names: that of `datasets`, and Common Voice's.
FILE_COLUMNS = ("file_name", "path")
# Endings of recordings. PyAV reads those of the second line.
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64", ".rf64"}
AUDIO_SUFFIXES |= {".m4a", ".mp4", ".aac", ".wma", ".webm", ".amr", ".3gp", ".mka", ".mkv", ".mov"}
# Endings of files beside recordings.
NO_AUDIO = {".txt", ".json", ".csv", ".tsv", ".jsonl", ".lab", ".textgrid", ".srt", ".vtt", ".md", ".xlsx", ".ods"}
NO_AUDIO |= {".ass", ".eaf", ".jpg", ".jpeg", ".png", ".webp", ".pdf", ".description"}
_DEPTH = 3  # folders below a table in which a file is looked for


def read_recordings(path: Path, language: str | None = None, file_columns: Sequence[str] = FILE_COLUMNS) -> Table:
    """
    Read a table (see [`read_cells`]) and find its recordings.

    Names are relative to the table's folder; those of the column `path` in a tsv, as in Common Voice, to the folder
    `clips` beside it. A name may lack its ending or its folder, if only one file below the table's folder has it.

    Args:
        path (`Path`): The table.
        language (`str`, *optional*): Whisper's code of the language of its text.
        file_columns (`Sequence[str]`): Columns of file names; the first that the table has is read.

    Rows with `start` and `end` are segments, so a recording may have several.

    Returns:
        [`Table`]: with `files`. A file that is not found is where its name says.

    Raises:
        ValueError: no row, no column of file names, a row without a name, or a name that comes twice without times.
        OSError: the table cannot be opened.
    """
    table = read_cells(path, language)
    column = next(filter(None, (find_column(table.columns, name) for name in file_columns)), None)
    if not table.rows:
        raise ValueError(f"{path} has 0 rows of {', '.join(table.columns)}: expected one for each recording")
    if column is None:
        raise ValueError(
            f"{path} has no column {file_columns[0]!r} of file names, but {', '.join(table.columns)}: rename one, "
            "or name it (peft-clsr train: --file_column)"
        )
    is_common_voice = path.suffix.lower() == ".tsv" and column == "path"
    finder = _Finder(path.parent, path.parent / "clips" if is_common_voice else path.parent)
    has_times = [table.rename(name) for name in (START_COLUMN, END_COLUMN)]
    if has_times.count(True) == 1:
        log_once(f"{path} has only one of the columns {START_COLUMN!r} and {END_COLUMN!r}: rows are whole recordings")
    rows: dict[Path, int] = {}
    for row, cells in enumerate(table.rows):
        if not cells[column].strip():
            raise ValueError(f"{table.place(row)} has no {column}: give the name of its recording, or remove the row")
        try:
            file = finder.find(cells[column])
        except ValueError as error:
            raise ValueError(f"{table.place(row)}: {error}") from error
        table.files.append(file)
        is_segment = all(has_times) and (cells[START_COLUMN].strip() or cells[END_COLUMN].strip())
        if not is_segment and rows.setdefault(file, row) != row:
            raise ValueError(
                f"{table.place(row)} has the recording {cells[column]!r} of line {table.places[rows[file]]} again: "
                "remove one of the two rows"
            )
    return table


class _Finder:
    """Finds files by the names in a table: in `folder`, else anywhere below `root`."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root = root
        self.folder = folder

    def find(self, cell: str) -> Path:
        """
        The file of a name, or where it would be.

        Raises:
            ValueError: several files fit.
        """
        name = cell.strip()
        slashed = name.replace("\\", "/")  # a name from Windows
        for spelling in dict.fromkeys((name, slashed, cell)):
            if os.path.isfile(os.path.join(self.folder, spelling)):
                return self.folder / spelling
        *folders, last = [part for part in name_key(slashed).split("/") if part != "."]
        fitting = [
            file
            for file in self._files.get(last, [])
            if name_key(file.parent.as_posix()).split("/")[-len(folders) :] == folders or not folders
        ]
        if len(fitting) > 1:
            raise ValueError(f"the name {cell!r} fits {fitting[0]} and {fitting[1]}: give its folder and ending")
        return fitting[0] if fitting else self.folder / slashed

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        """Files below the root, by name with and without ending."""
        found: dict[str, list[Path]] = {}
        for parent, folders, names in os.walk(self.root):
            depth = len(Path(parent).relative_to(self.root).parts)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and depth < _DEPTH)
            for name in sorted(names):
                stem, ending = os.path.splitext(name)
                if not name.startswith(".") and ending.lower() not in NO_AUDIO:
                    for key in {name_key(name), name_key(stem)}:
                        found.setdefault(key, []).append(Path(parent, name))
        return found


def name_key(name: str) -> str:
    """Names that differ in case, or in how accents are encoded (macOS: NFD), are the same on other systems."""
    return unicodedata.normalize("NFC", name).casefold()
