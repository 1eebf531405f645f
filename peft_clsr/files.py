"""Finding files; reading and writing of small ones; hashes of large ones."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 4 * 2**20  # a config or record has 1 to 10 kB
_LONG_NAME = 130  # bytes; file systems take names of 255, encrypted ones of 143


def existing_path(path: str | os.PathLike) -> Path:
    """
    Find a file whose name is spelled in another Unicode form.

    "ü" is one character (NFC) or "u" and a combining mark (NFD, as macOS and its archives write it). They look alike,
    but are different names on most disks.

    Args:
        path (`str` or `os.PathLike`): The path of a file or folder.

    Returns:
        `Path`: the path as it is on the disk, or as it was given, if there is neither spelling.
    """
    path = Path(path)
    if os.path.lexists(path) or str(path).isascii():
        return path
    folder = existing_path(path.parent)
    for form in ("NFC", "NFD"):
        other = folder / unicodedata.normalize(form, path.name)
        if os.path.lexists(other):
            return other
    return path


def read_json(path: str | Path) -> Any:
    """
    Read JSON of unknown origin.

    Raises:
        ValueError: the file is larger than 4 MiB, is no JSON, or is nested too deeply for Python.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} is larger than {MAX_JSON_BYTES} bytes, no config or record is so large: do not load it"
        )
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or integers of thousands of digits
        raise ValueError(f"{path} cannot be read as JSON ({error}): get the file again") from error


def to_json(value: Any, *, indent: int | None = 2, sort_keys: bool = False, ensure_ascii: bool = False) -> str:
    """
    Write a value as JSON, with a newline at the end. All JSON files of this project are written by this.

    NaN and infinities become `null`: JSON has neither, and strict readers refuse the whole file.
    """
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=ensure_ascii, sort_keys=sort_keys, allow_nan=False)
    return text + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_output_folder(folder: str | Path, option: str) -> None:
    """
    Check that a folder is there or can be made, and that files can be written in it. Nothing is made.

    Args:
        folder (`str` or `Path`): The folder.
        option (`str`): Where the user gave it, such as "--output_dir"; for the message.

    Raises:
        ValueError: it cannot be used.
    """
    nearest = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    if not nearest.is_dir():
        where = "" if nearest == Path(folder) else f" would be in {nearest}, which"
        raise ValueError(f"{option} {folder}{where} is a file, expected a folder, which need not exist")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {folder} cannot be used: you may not write to {nearest}; choose another folder")


def unfinished_path(path: Path) -> Path:
    """The path beside a file at which it grows: its name with ".part". A long name is cut, and gets a hash."""
    name = path.name
    if len(os.fsencode(name)) > _LONG_NAME:
        name = f"{name[:20]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return path.with_name(f"{name}.part")


def copy_file(source: str | Path, target: str | Path) -> None:
    """
    Copy a file completely or not at all. A file that is there is replaced.

    Raises:
        OSError: the file cannot be copied. The file that was there stays as it is.
    """
    target = Path(target)
    unfinished = unfinished_path(target)
    try:
        shutil.copyfile(source, unfinished)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write text in UTF-8 as [`write_bytes`] does."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """
    Write a file completely or not at all. Folders are made; a file that is there is replaced.

    Raises:
        OSError: the file cannot be written. The file that was there stays as it is.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_path(path)
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
