"""Reads the cells of a table: csv, tsv or JSON lines, with the line of each row."""

from __future__ import annotations

import csv
import functools
import io
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .encodings import decode_text
from .json_lines import read_json_lines

logger = logging.getLogger(__name__)

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")


@functools.cache
def log_once(message: str, level: int = logging.WARNING) -> None:
    """Log a message, but each only once in a process, as a run reads its tables several times."""
    logger.log(level, message)


@dataclass
class Table:
    """
    The rows of a table. All cells are text.

    Args:
        path (`Path`): The file, or the folder of recordings with a text file each.
        columns (`list[str]`): Their names, without spaces around them.
        rows (`list[dict[str, str]]`): Cells by column.
        places (`Sequence[Any]`): For each row, the line where it starts, or its text file.
        files (`list[Path]`): For each row, its recording.
    """

    path: Path
    columns: list[str]
    rows: list[dict[str, str]]
    places: Sequence[Any]
    files: list[Path] = field(default_factory=list)

    def place(self, row: int) -> str:
        """Where a row stands, for messages."""
        place = self.places[row]
        return f"{self.path}, line {place}" if isinstance(place, int) else str(place)

    def select(self, rows: Sequence[int]) -> Table:
        """The table with only these rows."""
        places, files = [self.places[row] for row in rows], [self.files[row] for row in rows]
        return Table(self.path, self.columns, [self.rows[row] for row in rows], places, files)

    def rename(self, name: str) -> bool:
        """Give a column its name as the code knows it, whatever its case. True if there is such a column."""
        found = find_column(self.columns, name)
        if found is not None and found != name:
            self.columns[self.columns.index(found)] = name
            self.rows = [{name if key == found else key: cell for key, cell in row.items()} for row in self.rows]
        return found is not None


def find_column(columns: Sequence[str], name: str) -> str | None:
    """The column of this name, else that of the same name in another case or with spaces around it."""
    if name in columns:
        return name
    return next((column for column in columns if _key(column) == _key(name)), None)


def _key(column: str) -> str:
    return column.strip().casefold()


def read_cells(path: Path, language: str | None = None) -> Table:
    """
    Read a table of cells, in UTF-8, UTF-16 or the code page of a language (see [`decode_text`]).

    A csv has commas, semicolons or tabs between its cells, and quotes around those that contain one. A tsv has tabs.
    In Common Voice's, quotes are text. A jsonl has a JSON object in each line.

    Args:
        path (`Path`): The file.
        language (`str`, *optional*): Tag of the language of its text.

    Returns:
        [`Table`]: without `files`.

    Raises:
        ValueError: the file is no such table; the message has the file and the line.
        OSError: the file cannot be opened.
    """
    text, encoding = decode_text(path.read_bytes(), str(path), language)
    if path.suffix.lower() == ".jsonl":
        table, delimiter = Table(path, *read_json_lines(path, text)), ""
    else:
        table, delimiter = _read_csv(path, text)
    twice = {_key(column) for column in table.columns if [*map(_key, table.columns)].count(_key(column)) > 1}
    if twice:
        raise ValueError(f"{path}, line 1 has the column {min(twice)!r} twice: rename one, or remove it")
    if encoding != "utf-8":
        example = re.search(r"[^\n]*[^\x00-\x7f][^\n]*", text)
        cells = f", cells separated by {delimiter!r}" if delimiter else ""
        log_once(
            f"{path} is read as {encoding}{cells}" + (f", such as {example[0].strip()[:80]!r}" if example else "")
        )
    return table


def _read_csv(path: Path, text: str) -> tuple[Table, str]:
    """The rows of a csv or tsv, and its delimiter."""
    if "\n" not in text:
        text = text.replace("\r", "\n")  # line ends of the old Mac OS
    marked = re.match(r'"?sep=(.)"?\r?\n', text)  # Excel writes and reads such a line
    start, text = (1, text[marked.end() :]) if marked else (0, text)
    header = text.lstrip().partition("\n")[0]
    is_tsv = path.suffix.lower() == ".tsv"
    delimiter = "\t" if is_tsv else marked[1] if marked else _find_delimiter(path, header)
    # In a csv, quotes are quotes, also after ", ". Between tabs, quotes that do not pair are text, as few texts have
    # a tab. In Common Voice's tsv all quotes are text.
    dialects: list[dict[str, Any]] = [{"strict": True, "skipinitialspace": True}, {"quoting": csv.QUOTE_NONE}]
    if delimiter != "\t":
        dialects.pop()
    elif is_tsv and find_column(header.split("\t"), "path"):
        dialects.pop(0)
    problem: csv.Error | None = None
    for dialect in dialects:
        try:
            return _parse(path, text, start, {"delimiter": delimiter, **dialect}), delimiter
        except csv.Error as error:
            problem = error
    raise ValueError(str(problem)) from problem


def _find_delimiter(path: Path, header: str) -> str:
    """The delimiter that gives the most columns in the header."""
    try:
        return max(",;\t", key=lambda delimiter: len(_cells_of(header, delimiter)))
    except csv.Error as error:
        raise ValueError(f"{path}, line 1 cannot be read as names of columns: {error}") from error


def _cells_of(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line.rstrip("\r")], delimiter=delimiter), [])


def _parse(path: Path, text: str, start: int, dialect: dict[str, Any]) -> Table:
    """Parse cells. Raises `csv.Error` for what is no csv in this dialect."""
    # Lines end at "\n" only: csv then refuses a stray "\r", and numbers are those of an editor.
    reader = csv.reader(io.StringIO(text, newline="\n"), **dialect)
    columns: list[str] = []
    width = 0
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    for line, cells in _numbered(path, reader, start):
        if not any(cells):
            continue
        if not columns:
            columns = [cell.strip() for cell in cells]
            width = len(columns)
            while columns and not columns[-1]:  # a spreadsheet's empty columns at the right
                columns.pop()
            continue
        if len(cells) > len(columns) and (len(cells) > width or any(cell.strip() for cell in cells[len(columns) :])):
            raise ValueError(
                f"{path}, line {line} has more cells than the {len(columns)} columns: quote text that has "
                f"{dialect['delimiter']!r}"
            )
        # A row may be a file name alone, without a cell for the text.
        if len(cells) < len(columns) and not (len(cells) == 1 and _looks_like_file(cells[0])):
            raise ValueError(
                f"{path}, line {line} has {len(cells)} of the {len(columns)} cells ({', '.join(columns)}): is the row "
                "split by a line end, or a cell left out?"
            )
        if any("\n" in cell for cell in cells):
            _check_quotes(path, line, cells, columns, dialect["delimiter"])
        cells += [""] * (len(columns) - len(cells))
        rows.append(dict(zip(columns, cells, strict=False)))
        lines.append(line)
    for row in rows if "" in columns else []:
        del row[""]  # pandas writes its index as a column without a name
    return Table(path, [column for column in columns if column], rows, lines)


def _numbered(path: Path, reader: Any, start: int) -> Iterator[tuple[int, list[str]]]:
    """Rows with the line where each starts."""
    while True:
        end = start + reader.line_num
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = ""
            if "unexpected end" in str(error):
                hint = f": a quote in line {end + 1} or below is not closed"
            elif "expected after" in str(error):
                hint = f": a quote in line {end + 1} is not closed, or stands inside a cell; double it inside quotes"
            elif "new-line" in str(error):
                raise csv.Error(
                    f"{path} cannot be read after line {end}: line {end + 1} has a carriage return inside the row: "
                    "remove it, or quote the cell"
                ) from error
            raise csv.Error(f"{path} cannot be read after line {end}: {error}{hint}") from error
        yield end + 1, cells


def _check_quotes(path: Path, line: int, cells: list[str], columns: list[str], delimiter: str) -> None:
    """A cell of several lines is legal. Refuse one that has swallowed rows, as its quote was not closed."""
    for cell in cells:
        for further in cell.split("\n")[1:]:
            inner = _cells_of(further, delimiter)
            if len(inner) >= len(columns) > 1 and any(map(_looks_like_file, inner)):
                raise csv.Error(
                    f"{path} cannot be read after line {line - 1}: a quote in line {line} is not closed before the "
                    f"row {further.strip()!r}"
                )


def _looks_like_file(cell: str) -> bool:
    return re.fullmatch(r".*\w\.(?=\w*[A-Za-z])\w{2,5}", cell.strip()) is not None
