"""A file of results, a line of JSON for each run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Results:
    """
    A file with a line of JSON for each finished run.

    Args:
        path (`Path`): The file. It is made with the first line.
        keys (`tuple[str, ...]`): The values that tell a run from others.
    """

    def __init__(self, path: Path, keys: tuple[str, ...]) -> None:
        self.path, self.keys = path, keys

    def find(self, run: dict[str, Any]) -> dict[str, Any] | None:
        """The results of a run, if it is in the file."""
        return next((row for row in self.rows() if all(row[name] == run[name] for name in self.keys)), None)

    def rows(self) -> list[dict[str, Any]]:
        """The lines of the file, none if it does not exist."""
        return [*map(json.loads, self.path.read_text(encoding="utf-8").splitlines())] if self.path.is_file() else []

    def add(self, row: dict[str, Any]) -> None:
        """Append the results of a run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
