"""Reads recordings of any format and rate as mono waveforms."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, BinaryIO

import numpy as np

from ..extras import require
from ..files import existing_path
from .containers import container_seconds, decode_container

# A recording that ends so much before the length in its header, in seconds, is truncated.
_MISSING_SECONDS = 0.25
# Floats lie between -1 and 1. A mix or a lossy codec may pass that a little; integers that became floats pass it far.
_MAX_FLOAT = 10.0
_STDERR_LOCK = threading.Lock()


class EmptyAudioError(ValueError):
    """The audio has no samples."""


class TruncatedAudioError(ValueError):
    """The audio ends before the length that its header says. `samples` is what there is: float32 [samples]."""

    def __init__(self, message: str, samples: np.ndarray) -> None:
        super().__init__(message)
        self.samples = samples


def audio_name(audio: Any) -> str:
    """The name of `audio` in messages: its path, if it has one."""
    if isinstance(audio, (str, os.PathLike)):
        return os.fspath(audio)
    if isinstance(audio, dict) and audio.get("path"):
        return os.fspath(audio["path"])
    return "<audio without a path>"


def read_audio(
    audio: str | os.PathLike | dict[str, Any], sampling_rate: int = 16000, start: float = 0.0, end: float | None = None
) -> np.ndarray:
    """
    Read audio as one channel at the given rate.

    A part of a long file is read without decoding the rest, where the format allows it: WAV, FLAC, OGG, MP3, M4A,
    MP4, MOV, WebM, MKV. Others (AAC without a container, AMR, WMA, MPEG) are decoded from their beginning.

    Args:
        audio (`str`, `os.PathLike` or `dict`):
            A path, or a cell of `datasets`: `{"bytes", "path"}` from a column cast to `Audio(decode=False)`, or
            `{"array", "sampling_rate"}` with an array [samples] or [channels, samples]. libsndfile reads WAV, FLAC,
            OGG, MP3 and others. PyAV reads what it refuses: M4A, AAC, WebM, AMR, WMA, 3GP, and the sound of videos. An
            array holds floats from -1 to 1, or int8, int16, int32 or uint8, which are scaled to that.
        sampling_rate (`int`, *optional*, defaults to 16000): The rate of the result, in Hz.
        start (`float`, *optional*, defaults to 0.0): Where to start, in seconds.
        end (`float`, *optional*): Where to end, in seconds. By default at the end of the audio.

    Returns:
        `np.ndarray`: float32 [samples]. Channels are averaged; another rate is resampled with soxr.

    Raises:
        EmptyAudioError: (a `ValueError`) no samples.
        TruncatedAudioError: (a `ValueError`) the file ends before the length in its header.
        ValueError:
            The audio cannot be read, holds NaN, infinite or far too large values, or integers of unknown range. All
            messages name the file.
    """
    name, seconds = audio_name(audio), None
    if isinstance(audio, dict) and audio.get("array") is not None:
        samples, rate = _array(audio, name)
        samples = samples[:, round(start * rate) : None if end is None else round(end * rate)]
    else:
        samples, rate, seconds = _decode(audio, name, start, end)
    if samples.size == 0:
        raise EmptyAudioError(f"audio {name} is empty (0 samples)")
    samples = _scaled(samples, name).mean(axis=0)
    end_read = start + len(samples) / rate
    if rate != sampling_rate:
        samples = require("soxr").resample(samples, rate, sampling_rate)
        if samples.size == 0:
            raise EmptyAudioError(f"audio {name} is empty (0 samples at {sampling_rate} Hz)")
    samples = np.ascontiguousarray(samples, dtype=np.float32)
    if seconds is not None and end_read < min(seconds, seconds if end is None else end) - _MISSING_SECONDS:
        raise TruncatedAudioError(
            f"audio {name} ends after {end_read:.1f} s of the {seconds:.1f} s that its header says: it may be "
            "truncated, copy it again",
            samples,
        )
    return samples


def audio_seconds(audio: str | os.PathLike | dict[str, Any]) -> float:
    """
    Return the length of a recording in seconds, from its header, without decoding it.

    Args:
        audio (`str`, `os.PathLike` or `dict`): As in [`read_audio`].

    Raises:
        EmptyAudioError: (a `ValueError`) no samples.
        ValueError: the header cannot be read. Both messages are those of [`read_audio`].
    """
    name = audio_name(audio)
    if isinstance(audio, dict) and audio.get("array") is not None:
        samples, rate = _array(audio, name)
        seconds = samples.shape[-1] / rate
    else:
        with _open(audio, name) as file:
            try:
                with require("soundfile").SoundFile(file) as sound:
                    seconds = sound.frames / sound.samplerate
            except (RuntimeError, OSError, TypeError) as refusal:  # LibsndfileError is a RuntimeError
                file.seek(0)
                try:
                    seconds = container_seconds(file)
                except ValueError as error:
                    raise ValueError(_unreadable(name, refusal, error)) from error
    if seconds == 0:
        raise EmptyAudioError(f"audio {name} is empty (0 samples)")
    return seconds


def _array(audio: dict[str, Any], name: str) -> tuple[np.ndarray, float]:
    """The array of a dict, [channels, samples], and its rate in Hz."""
    rate = audio.get("sampling_rate")
    if not rate or rate < 0:
        raise ValueError(
            f"audio {name} has an 'array' but no 'sampling_rate': give its rate in Hz"
            if not rate
            else f"audio {name} has a 'sampling_rate' of {rate}, expected a positive number of Hz"
        )
    try:
        samples = np.asarray(audio["array"])
    except (TypeError, ValueError, RuntimeError) as error:  # a ragged list, a tensor on a GPU
        raise ValueError(
            f"audio {name} has an 'array' that NumPy cannot read ({error}): give a NumPy array"
        ) from error
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[0] > max(samples.shape[1], 1)):
        raise ValueError(
            f"audio {name} has an array of shape {samples.shape}; expected [samples] or [channels, samples] "
            "(transpose what soundfile reads)"
        )
    return np.atleast_2d(samples), rate


def _scaled(samples: np.ndarray, name: str) -> np.ndarray:
    """Samples of any type as float32 from -1 to 1."""
    if samples.dtype.name in ("int8", "int16", "int32"):
        return samples.astype(np.float32) / 2 ** (8 * samples.dtype.itemsize - 1)
    if samples.dtype == np.uint8:  # as in 8-bit WAV, silence is 128
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind != "f":
        raise ValueError(
            f"audio {name} has samples of type {samples.dtype}, whose range is unknown: convert them to their "
            "original type, such as array.astype('int16'), or to floats from -1 to 1"
        )
    if not np.isfinite(samples).all():
        raise ValueError(f"audio {name} holds NaN or infinite samples: it is damaged, remove or re-record it")
    peak = max(samples.max(), -samples.min())
    if peak > _MAX_FLOAT:
        raise ValueError(
            f"audio {name} holds floats up to {peak:g}, expected -1 to 1: divide them by the range of the integers "
            "that they were, such as array / 32768 for 16 bits"
        )
    return samples.astype(np.float32, copy=False)


def _open(audio: Any, name: str) -> BinaryIO:
    """Open the file of a path or of `{"bytes", "path"}`."""
    if isinstance(audio, dict) and audio.get("bytes") is not None:
        if len(audio["bytes"]) == 0:
            raise EmptyAudioError(f"audio {name} is empty (0 bytes)")
        return io.BytesIO(audio["bytes"])
    path = audio.get("path") if isinstance(audio, dict) else audio
    if not path or not isinstance(path, (str, os.PathLike)):
        raise ValueError(
            f"audio must be a path or a dict with 'array' and 'sampling_rate', or with 'bytes' or 'path'; got "
            f"{sorted(audio) if isinstance(audio, dict) else type(audio).__name__}"
        )
    path = existing_path(path)
    if not os.path.isfile(path):  # unlike Path.is_file, also False for a name that the disk does not allow
        what = "it is a folder" if os.path.isdir(path) else "no such file"
        raise ValueError(f"audio {name} cannot be read: {what}")
    try:
        if path.stat().st_size == 0:
            raise EmptyAudioError(f"audio {name} is empty (0 bytes)")
        return path.open("rb")
    except OSError as error:
        raise ValueError(f"audio {name} cannot be read: {error.strerror}") from error


def _decode(audio: Any, name: str, start: float, end: float | None) -> tuple[np.ndarray, float, float | None]:
    """Decode a part of a file: samples [channels, samples], their rate in Hz, and the length that its header says."""
    with _open(audio, name) as file:
        try:
            sound = require("soundfile").SoundFile(file)
        except (RuntimeError, OSError, TypeError) as refusal:
            file.seek(0)
            try:
                return decode_container(file, name, start, end)
            except ValueError as error:
                raise ValueError(_unreadable(name, refusal, error)) from error
        # What libsndfile opens and cannot decode is damaged: PyAV would read a part of it, silently.
        try:
            with sound:
                rate = sound.samplerate
                frames = -1 if end is None else max(round(end * rate) - round(start * rate), 0)
                # After a seek in an MP3, mpg123 prints errors about frames before the part, which it does not use.
                with _no_stderr() if start > 0 and sound.format == "MP3" else nullcontext():
                    if start > 0:
                        _seek(sound, min(round(start * rate), sound.frames))
                    samples = sound.read(frames, dtype="float32", always_2d=True).T
                return samples, rate, sound.frames / rate
        except (RuntimeError, OSError) as error:
            raise ValueError(f"audio {name} cannot be read: {_reason(error)}") from error


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Drop what C code prints, also that of other threads: it is a matter of milliseconds."""
    with _STDERR_LOCK:
        try:
            kept = os.dup(2)
        except OSError:  # a process without stderr
            yield
            return
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _seek(sound: Any, frame: int) -> None:
    """Go to a frame."""
    try:
        sound.seek(frame)
    except RuntimeError:  # libsndfile cannot seek to the last seconds of Opus
        sound.seek(0)
        while frame > 0:
            skipped = len(sound.read(min(frame, sound.samplerate * 10), dtype="float32"))
            frame = frame - skipped if skipped else 0


def _unreadable(name: str, refusal: Exception, error: Exception) -> str:
    return f"audio {name} cannot be read: {error}; {_reason(refusal)} (libsndfile)"


def _reason(error: Exception) -> str:
    """libsndfile's own words. Those of soundfile have the address of an open file."""
    return str(getattr(error, "error_string", error)).rstrip(".")
