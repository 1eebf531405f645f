"""Audio in: files of any format and rate to mono waveforms, and the length of context that Whisper listens to."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
from torch import nn

# The encoder's second convolution has stride 2, and a mel frame is 10 ms: one position is 2 frames, 20 ms.
POSITIONS_PER_SECOND = 50


class EmptyAudioError(ValueError):
    """The audio holds no samples."""


def audio_name(audio: Any) -> str:
    """How messages call `audio`: its path where it has one."""
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
            A path (WAV, FLAC, OGG, MP3: what libsndfile reads), or what `datasets` gives: `{"bytes", "path"}` from a
            column cast to `Audio(decode=False)`, or `{"array", "sampling_rate"}`, with the array as [samples] or
            [channels, samples].
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
        import soxr

        samples = soxr.resample(samples, rate, sampling_rate)
        if samples.size == 0:
            raise EmptyAudioError(f"audio {name} is empty (0 samples at {sampling_rate} Hz)")
    return np.ascontiguousarray(samples, dtype=np.float32)


def _decode(audio: str | os.PathLike | dict[str, Any], name: str) -> tuple[np.ndarray, int]:
    """Decode a path or `{"bytes", "path"}`: mono samples [samples] and their rate in Hz."""
    import soundfile

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


def set_audio_context(model: nn.Module | None, processor: Any | None, seconds: float) -> None:
    """
    Cut the context of a Whisper, in place: the length of audio that each forward pass takes.

    Whisper has no padding mask in its encoder: every input is padded with silence to 30 s and costs as much, and an
    input of another length is refused. For a corpus of short utterances, a context that just holds them makes training
    several times cheaper. The convolutions and attention take any length; only the table of (fixed, sinusoidal)
    positions and the length checks know about 30 s, so cutting needs no new weights. The model was however trained on
    full contexts, and may ramble past the end of speech until fine-tuned at the shorter one. Model and processor must
    agree, so give both here; a saved adapter needs the same context when it is used.

    Args:
        model (`nn.Module` or `None`): A Whisper model of transformers, or a `PeftModel` around one.
        processor (`WhisperProcessor` or `None`): The processor whose feature extractor pads to the context.
        seconds (`float`):
            The new context in seconds, in (0, current context]; a multiple of 0.02 (one encoder position), and whole
            where a processor is given. Cutting cannot be undone, so a context never grows: load the model again.

    Raises:
        ValueError: `seconds` outside of that; nothing has been changed then.
    """
    positions = round(seconds * POSITIONS_PER_SECOND)
    encoder = None
    if model is not None:
        whisper = model.get_base_model() if hasattr(model, "get_base_model") else model
        encoder = whisper.get_encoder()
        _check_context(seconds, encoder.config.max_source_positions / POSITIONS_PER_SECOND, "model")
    if processor is not None:
        extractor = processor.feature_extractor
        _check_context(seconds, extractor.n_samples / extractor.sampling_rate, "processor")
        if not float(seconds).is_integer():
            # When loaded, the extractor computes n_samples = chunk_length * rate, and cannot pad to a float.
            raise ValueError(
                f"a processor's audio context must be whole seconds, or it could not be loaded; got {seconds} s"
            )

    if encoder is not None:
        weight = encoder.embed_positions.weight
        encoder.embed_positions.weight = nn.Parameter(weight.detach()[:positions].clone(), requires_grad=False)
        encoder.embed_positions.num_embeddings = positions  # the encoder counts its positions with this
        encoder.max_source_positions = positions
        # Usually one object; a PeftModel or a loaded encoder may hold its own.
        for config in (encoder.config, whisper.config):
            config.max_source_positions = positions
    if processor is not None:
        extractor.chunk_length = int(seconds)
        extractor.n_samples = extractor.chunk_length * extractor.sampling_rate
        extractor.nb_max_frames = extractor.n_samples // extractor.hop_length


def _check_context(seconds: float, current: float, owner: str) -> None:
    if not 0 < seconds <= current:
        raise ValueError(
            f"an audio context of {seconds} s is outside (0, {current:g}], where {current:g} s is the {owner}'s "
            "current context; a context can only be cut (load the model and processor again for a longer one)"
        )
    positions = seconds * POSITIONS_PER_SECOND
    if round(positions) < 1 or abs(positions - round(positions)) > 1e-6:
        raise ValueError(
            f"an audio context of {seconds} s is no multiple of 0.02 s, the length of an encoder position"
        )
