"""The rows of one language, by the column `language` of a table or dataset."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from ..extras import require
from ..languages.tags import are_equal_tags, closest_tags, language_tag
from .table_reader import Table, find_column, log_once

if TYPE_CHECKING:
    import datasets

LANGUAGE_COLUMN = "language"


def write_tags(table: Table) -> bool:
    """
    Write standard tags into the column `language` of a table. Empty cells stay empty.

    Returns:
        `bool`: True if the table has this column, in any case and with spaces around it.

    Raises:
        ValueError: a language that is neither a tag nor a name. The message has the line.
    """
    if not table.rename(LANGUAGE_COLUMN):
        return False
    tags = {"": ""}
    for row, cells in enumerate(table.rows):
        name = cells[LANGUAGE_COLUMN].strip()
        if name not in tags:
            try:
                tags[name] = language_tag(name)
            except ValueError as error:
                raise ValueError(f"{table.place(row)}, column {LANGUAGE_COLUMN!r}: {error}") from error
        cells[LANGUAGE_COLUMN] = tags[name]
    return True


def table_of_language(table: Table, tag: str, loaded: Collection[str] = ()) -> Table:
    """
    The rows of one language, or all if the table has no column `language`.

    A row of "ca-valencia" is one of "ca", unless "ca-valencia" is in `loaded`. Rows of further languages are reported
    as unused, except those of `loaded`.

    Raises:
        ValueError: a row has no language, or one that is neither a tag nor a name, or no row is of this language.
    """
    if not write_tags(table):
        return table
    tags = [row[LANGUAGE_COLUMN] for row in table.rows]
    if "" in tags:
        raise ValueError(f"{table.place(tags.index(''))} has no language: fill the column {LANGUAGE_COLUMN!r}")
    taken = _taken_for(tags, tag, loaded)
    _report(Counter(taken[found] for found in tags), taken, tag, str(table.path), loaded)
    return table.select([row for row, found in enumerate(tags) if taken[found] == tag])


def dataset_of_language(
    dataset: datasets.Dataset, tag: str, name: str, loaded: Collection[str] = ()
) -> datasets.Dataset:
    """
    The rows of one language, or all if the dataset has no column `language`.

    A dataset on the Hub may have languages that are no tags; their rows are other languages. If all rows are of one
    such language, all are taken, with a warning.

    Args:
        dataset (`datasets.Dataset`): With texts or a `ClassLabel` in the column `language`, in any case.
        tag (`str`): The language, a tag.
        name (`str`): The dataset's, for messages.
        loaded (`Collection[str]`, *optional*): Tags of languages that are not reported as unused.

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
    tags = {value: _tag(value) for value in set(values)}
    if len(tags) == 1 and None in tags.values():
        (value,) = tags
        log_once(f"{name} has the language {value!r}, which is no language tag: all rows are taken as {tag!r}")
        return dataset
    taken = _taken_for([found for found in tags.values() if found is not None], tag, loaded)
    kinds = {
        value: (value or "").strip() or "no language" if found is None else taken[found]
        for value, found in tags.items()
    }
    counts = Counter(kinds[value] for value in values)
    _report(counts, taken, tag, name, loaded)
    if len(counts) == 1:
        return dataset
    return dataset.select([row for row, value in enumerate(values) if kinds[value] == tag])


def _tag(value: str | None) -> str | None:
    try:
        return language_tag((value or "").strip())
    except ValueError:
        return None


def _taken_for(tags: Iterable[str], tag: str, loaded: Collection[str]) -> dict[str, str]:
    """The language that the rows of each tag are taken for: one of those that are loaded, or their own."""
    return {found: (closest_tags(found, dict.fromkeys([tag, *loaded])) or [found])[0] for found in set(tags)}


def _report(counts: Counter[str], taken: dict[str, str], code: str, name: str, loaded: Collection[str]) -> None:
    """Say how many rows are of the language, and which others there are that nobody loads."""
    if not counts[code]:
        raise ValueError(
            f"{name} has no row of language {code!r}; it has {', '.join(f'{n} of {c}' for c, n in counts.items())}"
        )
    broader = [found for found, tag in taken.items() if tag == code and not are_equal_tags(found, code)]
    for found in sorted(broader):
        log_once(f"{name}: the rows of {found} are taken for {code}, which is broader")
    used = {code, *loaded}
    others = ", ".join(f"{count} of {other}" for other, count in counts.most_common() if other not in used)
    others = f"; of other languages, not used: {others}" if others else ""
    log_once(f"{name}: {counts[code]} rows of {code}{others}", logging.INFO)
