"""Reads JSON lines: an object on each line, with text in its cells."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def read_json_lines(path: Path, text: str) -> tuple[list[str], list[dict[str, str]], list[int]]:
    """
    Read the objects of a text as rows.

    Numbers become text, and lists and objects are left empty: they are no transcript. Names that differ in case, or in
    spaces around them, are one column, spelled as at first.

    Args:
        path (`Path`): The file, for messages.
        text (`str`): Its text.

    Returns:
        `tuple`: the columns, the rows, and the line of each.

    Raises:
        ValueError: a line is no JSON object, has a name twice, or text that is no Unicode. The message has the line.
    """
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    spellings: dict[str, str] = {}
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            pairs = json.loads(content, object_pairs_hook=list)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {line} is no JSON: {getattr(error, 'msg', error)}") from error
        if not content.lstrip().startswith("{"):
            raise ValueError(f'{path}, line {line} is no JSON object, such as {{"file_name": "a.wav"}}')
        row = {spellings.setdefault(name.strip().casefold(), name.strip()): _cell(value) for name, value in pairs}
        if len(row) < len(pairs):
            raise ValueError(f"{path}, line {line} has the same name twice: remove one")
        for cell in row.values():
            if "\0" in cell or not _is_unicode(cell):
                raise ValueError(f"{path}, line {line} has a NUL or half a character in {cell!r}: mend the text")
        rows.append(row)
        lines.append(line)
    columns = list(spellings.values())
    return columns, [{**dict.fromkeys(columns, ""), **row} for row in rows], lines


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, (list, dict)) or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return json.dumps(value)


def _is_unicode(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can escape but no file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
