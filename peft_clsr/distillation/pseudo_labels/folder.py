"""The folder of a teacher's labels: its settings, and lines of finished recordings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ...data.rows import files_digest
from ...data.segments import END_COLUMN, START_COLUMN
from ...files import check_output_folder, read_json, to_json, write_text

_SETTINGS, _LABELS = "settings.json", "labels-{}.jsonl"
# A killed process may leave these before there are settings.
_LEFTOVERS = (f"{_SETTINGS}.part", "process-*.tmp")
_NAMES = {"recordings": "number of recordings", "audio": "audio files, or times in them"}


def audio_digest(dataset: datasets.Dataset, audio_column: str) -> str:
    """
    Hash the recordings of a dataset: size and times of files, content that is in the dataset itself, start and end.

    Args:
        dataset (`datasets.Dataset`): Undecoded, as from `without_decoding`.
        audio_column (`str`): Column of audio.
    """
    import xxhash  # installed with datasets

    digest = xxhash.xxh3_128(files_digest(dataset, audio_column).encode())
    names = [name for name in (START_COLUMN, END_COLUMN) if name in dataset.column_names]
    for row in dataset.select_columns([audio_column, *names]):
        digest.update(repr([row[name] for name in names]).encode())
        audio = row[audio_column] if isinstance(row[audio_column], dict) else {}
        if audio.get("bytes") is not None:
            digest.update(audio["bytes"])
        elif audio.get("array") is not None:
            digest.update(np.asarray(audio["array"], dtype=np.float32).tobytes())
    return digest.hexdigest()


def check_folder(folder: Path) -> None:
    """
    Check that a folder is new, empty or one of labels, so that no other file is replaced. Nothing is written.

    Raises:
        ValueError: it has other files, or cannot be written.
    """
    check_output_folder(folder, "output_dir")
    if (folder / _SETTINGS).exists():
        read_settings(folder)
        return
    names = sorted(path.name for path in folder.glob("[!.]*") if not any(map(path.match, _LEFTOVERS)))
    if names:
        raise ValueError(
            f"output_dir {folder} has files that are no labels, such as {names[0]!r}: give a new or empty folder"
        )


def open_folder(folder: Path, settings: dict[str, Any]) -> None:
    """
    Write the settings of new labels, or compare them with those of earlier ones.

    Raises:
        ValueError: the folder has labels of other settings, which are named, or other files.
    """
    check_folder(folder)
    if not (folder / _SETTINGS).exists():
        write_text(folder / _SETTINGS, to_json(settings))
        return
    found = read_settings(folder)
    other = [_NAMES.get(key, key) for key, value in settings.items() if found.get(key) != value]
    if other:
        raise ValueError(
            f"output_dir {folder} has labels with another {' and '.join(other)}: give another folder, or remove it"
        )


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of labels. Raises a `ValueError` if the folder has none."""
    path = folder / _SETTINGS
    found = read_json(path) if path.is_file() else None
    if not isinstance(found, dict) or "teacher" not in found:
        raise ValueError(f"{folder} is not a folder of labels: give another one")
    return found


def labels_file(folder: Path, process: int) -> Path:
    """The file that a process appends its labels to."""
    return folder / _LABELS.format(process)


def read_labels(folder: Path) -> dict[int, dict[str, Any]]:
    """The labels of all processes, by row. A last line that was not written whole is cut off."""
    labels = {}
    for path in sorted(folder.glob(_LABELS.format("*"))):
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for line in whole.splitlines():
            label = json.loads(line)
            labels[label["row"]] = label
    return labels
