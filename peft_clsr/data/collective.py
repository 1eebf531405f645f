"""Datasets of Mozilla Data Collective, where Common Voice is: `mdc:ID`."""

from __future__ import annotations

import os
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

from ..extras import require
from ..sources import collective_id
from .split import PARTS
from .table_reader import TABLE_SUFFIXES

_KEY = "MDC_API_KEY"
_FOLDER = "MDC_DOWNLOAD_PATH"
_INSTEAD = "or unpack the dataset's archive yourself and give its folder"


def fetch_collective(name: str) -> Path:
    """
    Download a dataset of Mozilla Data Collective and unpack it, unless that was done before.

    It is stored in the folder that the environment variable `MDC_DOWNLOAD_PATH` names, by default
    `~/.mozdata/datasets`. An interrupted download is resumed.

    Args:
        name (`str`): "mdc:" and the ID of the dataset.

    Returns:
        `Path`: the unpacked folder that holds the recordings, such as `.../cv-corpus-23.0-2025-09-05/ro`.

    Raises:
        ModuleNotFoundError: datacollective is not installed (extra `mdc`).
        ValueError: the name has no ID, the environment has no API key, or there is no such dataset for this key.
        OSError: the server cannot be reached, the download was interrupted, or the archive is damaged.
    """
    identifier = collective_id(name)
    assert identifier is not None
    if sys.version_info < (3, 11, 4):
        raise ValueError(
            f"{name} needs Python 3.11.4 or newer, for the package datacollective: update Python, {_INSTEAD}"
        )
    collective = require("datacollective")  # it reads a file .env, too
    if not os.environ.get(_KEY):
        raise ValueError(
            f"{name} needs an API key of Mozilla Data Collective: make one in your profile on "
            f"https://mozilladatacollective.com, agree to the terms on the dataset's page, and set {_KEY} to the key; "
            f"{_INSTEAD}"
        )
    folder = Path(os.environ.get(_FOLDER) or "~/.mozdata/datasets").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    from filelock import FileLock  # installed with datasets

    with FileLock(folder / f".{identifier}.lock"):  # of the processes of a run, one downloads
        return _recordings_folder(_download(collective, name, identifier, folder))


def _download(collective: Any, name: str, identifier: str, folder: Path) -> Path:
    from datacollective.errors import DownloadError

    try:
        return collective.download_dataset(identifier, download_directory=str(folder), extract=True)
    except collective.AuthenticationError as error:
        raise ValueError(f"{name}: {error}; then set {_KEY} to it") from error
    except FileNotFoundError as error:
        raise ValueError(
            f"{name}: Mozilla Data Collective has no such dataset ({error}): check the ID, which is the last part of "
            "the address of the dataset's page"
        ) from error
    except PermissionError as error:
        raise ValueError(
            f"{name}: {error} (agree to the terms on the dataset's page with the account of {_KEY})"
        ) from error
    except DownloadError as error:
        raise OSError(
            f"{name}: the download was interrupted ({error.__cause__}): start again, to resume it"
        ) from error
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise OSError(
            f"{name}: the archive in {folder} cannot be unpacked ({error}): delete it, and start again"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(f"{name} cannot be downloaded: {error}; try again later, {_INSTEAD}") from error


def _recordings_folder(folder: Path) -> Path:
    """The folder of the tables: archives of Common Voice hold them in `cv-corpus-23.0-2025-09-05/ro`."""
    while True:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        folders = [entry for entry in entries if entry.is_dir()]
        has_tables = any(entry.suffix.lower() in TABLE_SUFFIXES for entry in entries)
        if has_tables or len(folders) != 1 or folders[0].name in PARTS:
            return folder
        folder = folders[0]
