"""Reads recordings of any format and rate as mono waveforms."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np

from ..extras import require


class EmptyAudioError(ValueError):
    """The audio has no samples."""


def audio_name(audio: Any) -> str:
    """The name of `audio` in messages: its path, if it has one."""
    if isinstance(audio, (str, os.PathLike)):
        return os.fspath(audio)
    if isinstance(audio, dict) and audio.get("path"):
        return os.fspath(audio["path"])
    return "<audio without a path>"


def read_audio(audio: str | os.PathLike | dict[str, Any], sampling_rate: int = 16000) -> np.ndarray:
    """
    Read audio as one channel at the given rate.

    Args:
        audio (`str`, `os.PathLike` or `dict`):
            A path (WAV, FLAC, OGG, MP3 and the other formats of libsndfile), or a cell of `datasets`:
            `{"bytes", "path"}` from a column cast to `Audio(decode=False)`, or `{"array", "sampling_rate"}` with an
            array [samples] or [channels, samples].
        sampling_rate (`int`, *optional*, defaults to 16000): The rate of the result, in Hz.

    Returns:
        `np.ndarray`: float32 [samples]. Channels are averaged; another rate is resampled with soxr.

    Raises:
        EmptyAudioError: (a `ValueError`) no samples.
        ValueError: the audio cannot be read, or holds NaN or infinite values. Both messages name the file.
    """
    name = audio_name(audio)
    if isinstance(audio, dict) and audio.get("array") is not None:
        if not audio.get("sampling_rate"):
            raise ValueError(f"audio {name} has an 'array' but no 'sampling_rate': give its rate in Hz")
        samples, rate = np.asarray(audio["array"], dtype=np.float32), int(audio["sampling_rate"])
        if samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[0] > max(samples.shape[1], 1)):
            raise ValueError(
                f"audio {name} has an array of shape {samples.shape}; expected [samples] or [channels, samples] "
                "(transpose what soundfile reads)"
            )
        if samples.ndim == 2:
            samples = samples.mean(axis=0)
    else:
        samples, rate = _decode(audio, name)
    if samples.size == 0:
        raise EmptyAudioError(f"audio {name} is empty (0 samples)")
    if not np.isfinite(samples).all():
        raise ValueError(f"audio {name} holds NaN or infinite samples: it is damaged, remove or re-record it")
    if rate != sampling_rate:
        samples = require("soxr").resample(samples, rate, sampling_rate)
        if samples.size == 0:
            raise EmptyAudioError(f"audio {name} is empty (0 samples at {sampling_rate} Hz)")
    return np.ascontiguousarray(samples, dtype=np.float32)


def audio_seconds(audio: dict[str, Any]) -> float | None:
    """
    Return the length of a recording in seconds, from its header.

    Args:
        audio (`dict`): A cell of `datasets`, as in [`read_audio`].

    Returns:
        `float` or `None`: the length, or `None` if the recording cannot be read.
    """
    if audio.get("array") is not None:
        return np.shape(audio["array"])[-1] / audio["sampling_rate"] if audio.get("sampling_rate") else None
    source = io.BytesIO(audio["bytes"]) if audio.get("bytes") else audio.get("path")
    try:
        return require("soundfile").info(source).duration
    except (RuntimeError, OSError, TypeError):  # LibsndfileError is a RuntimeError
        return None


def _decode(audio: str | os.PathLike | dict[str, Any], name: str) -> tuple[np.ndarray, int]:
    """Decode a path or `{"bytes", "path"}`: mono samples [samples] and their rate in Hz."""
    soundfile = require("soundfile")
    if isinstance(audio, (str, os.PathLike)):
        source: Any = os.fspath(audio)
    elif isinstance(audio, dict) and audio.get("bytes") is not None:
        if len(audio["bytes"]) == 0:
            raise EmptyAudioError(f"audio {name} is empty (0 bytes)")
        source = io.BytesIO(audio["bytes"])
    elif isinstance(audio, dict) and audio.get("path"):
        source = os.fspath(audio["path"])
    else:
        raise ValueError(
            f"audio must be a path or a dict with 'array' and 'sampling_rate', or with 'bytes' or 'path'; got "
            f"{sorted(audio) if isinstance(audio, dict) else type(audio).__name__}"
        )
    if isinstance(source, str):
        if not os.path.isfile(source):
            raise ValueError(f"audio {name} cannot be read: no such file")
        if os.path.getsize(source) == 0:
            raise EmptyAudioError(f"audio {name} is empty (0 bytes)")
    try:
        samples, rate = soundfile.read(source, dtype="float32", always_2d=True)  # [samples, channels]
    except (RuntimeError, OSError, TypeError) as error:  # LibsndfileError is a RuntimeError
        raise ValueError(f"audio {name} cannot be read: {error}") from error
    return samples.mean(axis=1), rate
