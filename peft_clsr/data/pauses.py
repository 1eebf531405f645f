"""Cuts recordings at pauses, and leaves out what is not speech (silero-vad)."""

from __future__ import annotations

import threading
import warnings
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ..extras import require

MAX_PAUSE = 4.0  # seconds; a longer pause is left out, as Whisper invents text in it
_MIN_PAUSE = 0.5  # seconds; shorter ones are inside of a sentence
_MARGIN = 0.2  # seconds of the pause that stay with the speech

# silero's model keeps a state between calls.
_lock = threading.Lock()


def cut_at_pauses(
    waveform: np.ndarray, sampling_rate: int = 16000, max_seconds: float = 30.0
) -> list[tuple[float, float]]:
    """
    Cut a recording at its pauses into parts with speech.

    silero-vad finds the speech. Speech with pauses of up to 4 s stays in one part, if it fits. Longer pauses, noise
    and music are in no part. Speech that is longer than a part is cut at the longest pause in it.

    Args:
        waveform (`np.ndarray`): float32 [samples].
        sampling_rate (`int`, *optional*, defaults to 16000): 16000 or 8000 Hz.
        max_seconds (`float`, *optional*, defaults to 30.0): Longest part; at least 1 s.

    Returns:
        `list[tuple[float, float]]`: start and end of each part in seconds, in order; empty without speech.

    Raises:
        ModuleNotFoundError: silero-vad is not installed (extra `vad`).
        ValueError: another sampling rate, or parts shorter than 1 s.

    Example:

    ```py
    >>> cut_at_pauses(read_audio("interview.ogg"))
    [(0.42, 28.1), (31.9, 55.0)]
    ```
    """
    if sampling_rate not in (8000, 16000):
        raise ValueError(
            f"the sampling rate is {sampling_rate} Hz; silero-vad needs 16000 or 8000: resample the audio"
        )
    if max_seconds < 1:
        raise ValueError(f"max_seconds is {max_seconds}; expected at least 1 s")
    parts: list[tuple[int, int]] = []
    for start, end in _speech(waveform, sampling_rate, max_seconds):
        is_near = parts and start - parts[-1][1] <= MAX_PAUSE * sampling_rate
        if is_near and end - parts[-1][0] <= max_seconds * sampling_rate:
            parts[-1] = parts[-1][0], end
        else:
            parts.append((start, end))
    return [(start / sampling_rate, end / sampling_rate) for start, end in parts]


def _speech(waveform: np.ndarray, sampling_rate: int, max_seconds: float) -> list[tuple[int, int]]:
    """Start and end of each stretch of speech, in samples."""
    silero = load_silero()
    with _lock, torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, which silero-vad uses
        found = silero.get_speech_timestamps(
            torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32)),
            _model(),
            sampling_rate=sampling_rate,
            max_speech_duration_s=max_seconds,
            min_silence_duration_ms=round(1000 * _MIN_PAUSE),
            speech_pad_ms=round(1000 * _MARGIN),
        )
    return [(stretch["start"], stretch["end"]) for stretch in found]


def load_silero() -> Any:
    """Import silero-vad. Raises a `ModuleNotFoundError` that names the extra."""
    threads = torch.get_num_threads()
    try:
        return require("silero_vad")
    finally:
        torch.set_num_threads(threads)  # its import sets 1, also for Whisper


@lru_cache(maxsize=1)
def _model() -> Any:
    return load_silero().load_silero_vad()
