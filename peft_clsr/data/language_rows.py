"""The rows of one language, by the column `language` of a table or dataset."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from ..extras import require
from ..languages import language_code
from .table_reader import Table, find_column, log_once

if TYPE_CHECKING:
    import datasets

LANGUAGE_COLUMN = "language"


def write_codes(table: Table) -> bool:
    """
    Write Whisper's codes into the column `language` of a table. Empty cells stay empty.

    Returns:
        `bool`: True if the table has this column, in any case and with spaces around it.

    Raises:
        ValueError: a language that Whisper does not know. The message has the line.
    """
    if not table.rename(LANGUAGE_COLUMN):
        return False
    codes = {"": ""}
    for row, cells in enumerate(table.rows):
        name = cells[LANGUAGE_COLUMN].strip()
        if name not in codes:
            try:
                codes[name] = language_code(name)
            except ValueError as error:
                raise ValueError(f"{table.place(row)}, column {LANGUAGE_COLUMN!r}: {error}") from error
        cells[LANGUAGE_COLUMN] = codes[name]
    return True


def table_of_language(table: Table, code: str, loaded: Collection[str] = ()) -> Table:
    """
    The rows of one language, or all if the table has no column `language`.

    Rows of further languages are reported as unused, except those of `loaded`.

    Raises:
        ValueError: a row has no language, or one that Whisper does not know, or no row is of this language.
    """
    if not write_codes(table):
        return table
    codes = [row[LANGUAGE_COLUMN] for row in table.rows]
    if "" in codes:
        raise ValueError(f"{table.place(codes.index(''))} has no language: fill the column {LANGUAGE_COLUMN!r}")
    rows = [row for row, found in enumerate(codes) if found == code]
    _report(Counter(codes), code, str(table.path), loaded)
    return table.select(rows)


def dataset_of_language(
    dataset: datasets.Dataset, code: str, name: str, loaded: Collection[str] = ()
) -> datasets.Dataset:
    """
    The rows of one language, or all if the dataset has no column `language`.

    A dataset on the Hub may have languages that Whisper does not know; their rows are other languages. If all rows
    are of one such language, the user has chosen a related one for it, and all are taken, with a warning.

    Args:
        dataset (`datasets.Dataset`): With texts or a `ClassLabel` in the column `language`, in any case.
        code (`str`): Whisper's code of the language.
        name (`str`): The dataset's, for messages.
        loaded (`Collection[str]`, *optional*): Codes of languages that are not reported as unused.

    Raises:
        ValueError: the column is of another type, or no row is of this language.
    """
    column = find_column(dataset.column_names, LANGUAGE_COLUMN)
    if column is None:
        return dataset
    if column != LANGUAGE_COLUMN:
        dataset = dataset.rename_column(column, LANGUAGE_COLUMN)
    feature = dataset.features[LANGUAGE_COLUMN]
    values = dataset.select_columns([LANGUAGE_COLUMN])[LANGUAGE_COLUMN][:]
    if isinstance(feature, require("datasets").ClassLabel):
        values = [None if value is None else feature.int2str(value) for value in values]
    elif getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"{name}, column {LANGUAGE_COLUMN!r} holds {getattr(feature, 'dtype', feature)}; expected names or codes "
            "of languages: rename the column if it is something else"
        )
    codes = {value: _code_or_name(value) for value in set(values)}
    if len(codes) == 1:
        (value,) = codes
        if not _is_known(value):
            log_once(f"{name} has the language {value!r}, which Whisper does not know: all rows are taken as {code!r}")
            return dataset
    counts = Counter(codes[value] for value in values)
    _report(counts, code, name, loaded)
    if len(counts) == 1:
        return dataset
    return dataset.select([row for row, value in enumerate(values) if codes[value] == code])


def _is_known(value: Any) -> bool:
    try:
        language_code((value or "").strip())
    except ValueError:
        return False
    return True


def _code_or_name(value: str | None) -> str:
    return language_code((value or "").strip()) if _is_known(value) else (value or "").strip() or "no language"


def _report(counts: Counter[str], code: str, name: str, loaded: Collection[str]) -> None:
    """Say how many rows are of the language, and which others there are that nobody loads."""
    if not counts[code]:
        raise ValueError(
            f"{name} has no row of language {code!r}; it has {', '.join(f'{n} of {c}' for c, n in counts.items())}"
        )
    used = {code, *loaded}
    others = ", ".join(f"{count} of {other}" for other, count in counts.most_common() if other not in used)
    others = f"; of other languages, not used: {others}" if others else ""
    log_once(f"{name}: {counts[code]} rows of {code}{others}", logging.INFO)
