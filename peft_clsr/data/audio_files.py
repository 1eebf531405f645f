"""Files of the audio of a dataset."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..extras import require
from ..files import write_bytes
from .audio import read_audio

_RATE = 16_000  # Hz, of what is written


def audio_paths(dataset: Any, column: str, folder: Path) -> Iterator[Path]:
    """
    The audio file of each row. Audio that is in the dataset itself is written to a folder, once for equal audio.

    Args:
        dataset (`datasets.Dataset`): Undecoded, as from `without_decoding`.
        column (`str`): Column of audio.
        folder (`Path`): Folder for audio that is in no file; made where it is needed.

    Yields:
        `Path`: an absolute path.
    """
    for audio in dataset.select_columns([column])[column]:
        yield _path_of(audio, folder).resolve()


def _path_of(audio: Any, folder: Path) -> Path:
    named = audio if isinstance(audio, str) else audio.get("path") if isinstance(audio, dict) else None
    content = audio.get("bytes") if isinstance(audio, dict) else None
    if named and content is None and Path(named).is_file():
        return Path(named)
    if content is None:
        samples = read_audio(audio, _RATE)
        path = folder / f"{hashlib.sha256(samples.tobytes()).hexdigest()[:16]}.flac"
        if not path.exists():
            file = io.BytesIO()
            require("soundfile").write(file, samples, _RATE, format="FLAC")
            write_bytes(path, file.getvalue())
        return path
    suffix = Path(named or "").suffix
    path = folder / f"{hashlib.sha256(content).hexdigest()[:16]}{suffix}"
    if not path.exists():
        write_bytes(path, content)
    return path
