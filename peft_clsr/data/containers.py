"""Reads audio with PyAV (FFmpeg) where libsndfile cannot: M4A, AAC, WebM, MP4, MKV, AMR, WMA, 3GP and others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, BinaryIO

import numpy as np

from ..extras import require
from .table_reader import log_once

# A codec fills up its last frame. So many seconds past the length in the header, at most, are padding.
_PADDING = 0.1
# Formats whose packets have exact times, as FFmpeg names them. In others, times after a seek are guessed.
_SEEKABLE = ("mp4", "matroska")
# Decoding starts so many seconds before a part, as codecs need the frames before.
_PREROLL = 0.5


def decode_container(
    file: BinaryIO, name: str = "", start: float = 0.0, end: float | None = None
) -> tuple[np.ndarray, int, float | None]:
    """
    Decode the audio track of a file, or a part of it.

    Args:
        file (`BinaryIO`): The open file.
        name (`str`, *optional*): Its name, for messages.
        start (`float`, *optional*, defaults to 0.0): Where to start, in seconds.
        end (`float`, *optional*): Where to end, in seconds. By default at the end of the track.

    Returns:
        `tuple`: samples [channels, samples] in the format of the codec (floats or integers), their rate in Hz, and the
        length that the header says, in seconds, or `None` if it says none that can be relied on.

    Raises:
        ValueError: no audio track, or data that FFmpeg does not read.
    """
    with _audio_track(file) as (container, track):
        seconds = _exact_seconds(container, track)
        frames: list[np.ndarray] = []
        rates, shapes = set(), set()
        skipped = 0.0  # seconds of the first kept frame that are before the part
        for position, frame in _timed_frames(container, track, seconds, start, name):
            if end is not None and position >= end:
                break
            if position + frame.samples / frame.sample_rate <= start:
                continue
            skipped = skipped if frames else start - position
            samples = frame.to_ndarray()  # [channels, samples], or [1, samples · channels] if they are interleaved
            frames.append(samples if frame.format.is_planar else samples.reshape(frame.samples, -1).T)
            rates.add(frame.sample_rate)
            shapes.add((len(frames[-1]), samples.dtype))
        if len(rates) > 1 or len(shapes) > 1:
            raise ValueError(f"its sampling rate or channels change in its middle ({sorted(rates)} Hz): convert it")
        if not frames:
            return np.zeros((1, 0), dtype=np.float32), track.rate or 16000, None
        samples, rate = np.concatenate(frames, axis=1), rates.pop()
        samples = samples[:, round(skipped * rate) :]
        if end is not None:
            samples = samples[:, : round(end * rate) - round(start * rate)]
        length = samples.shape[1] if seconds is None else round((seconds - start) * rate)
        if 0 < samples.shape[1] - length < _PADDING * rate:
            samples = samples[:, :length]  # so that it is as long as container_seconds says
        return samples, rate, seconds


def container_seconds(file: BinaryIO) -> float:
    """
    Return the length of the audio track, in seconds, without decoding it.

    Args:
        file (`BinaryIO`): The open file.

    Raises:
        ValueError: no audio track, or a header that FFmpeg does not read.
    """
    with _audio_track(file) as (container, track):
        if track.duration:
            return float(track.duration * track.time_base)
        if container.duration:
            return container.duration / 1e6
        # Browsers record WebM as a stream, without a length.
        ends = [packet.pts + (packet.duration or 0) for packet in container.demux(track) if packet.pts is not None]
        return float(max(ends, default=0) * track.time_base)


def _timed_frames(
    container: Any, track: Any, seconds: float | None, start: float, name: str
) -> Iterator[tuple[float, Any]]:
    """Decoded frames, each with its time in seconds, from the beginning or from a little before `start`."""
    frames, position = _frames(container, track, seconds), 0.0
    if start > _PREROLL:
        found = _frames_after_seek(container, track, seconds, start)
        if found is None:
            log_once(
                f"audio {name} is a {container.format.name} file without exact seeking: it is decoded from its "
                "beginning for each part of it, which is slow; convert a long one to FLAC, MP3 or M4A"
            )
            container.seek(0)
            frames = _frames(container, track, seconds)
        else:
            position, frames = found
    for frame in frames:
        yield position, frame
        position += frame.samples / frame.sample_rate


def _frames_after_seek(
    container: Any, track: Any, seconds: float | None, start: float
) -> tuple[float, Iterator[Any]] | None:
    """The frames from a little before `start` on, and the time of the first; `None` where seeking is not exact."""
    if not any(name in container.format.name for name in _SEEKABLE):
        return None
    beginning = float((track.start_time or 0) * track.time_base)
    try:
        container.seek(round((beginning + start - _PREROLL) / track.time_base), stream=track)
        frames = _frames(container, track, seconds)
        first = next(frames, None)
    except require("av").FFmpegError:  # a browser's WebM without an index
        return None
    if first is None or first.pts is None:
        return None
    position = float(first.pts * track.time_base) - beginning
    return None if position > start else (position, chain([first], frames))


def _frames(container: Any, track: Any, seconds: float | None) -> Iterator[Any]:
    """The decoded frames, up to a damaged one: the length in the header then tells that the rest is missing."""
    errors = require("av").FFmpegError
    count = 0
    try:
        for frame in container.decode(track):
            yield frame
            count += 1
    except errors:
        if seconds is None or count == 0:
            raise


@contextmanager
def _audio_track(file: BinaryIO) -> Iterator[tuple[Any, Any]]:
    """The open container and its audio track. FFmpeg's errors, also later ones, become a `ValueError`."""
    av = require("av")
    try:
        # An open file, not its path: a playlist can then open no other file or address.
        with av.open(file, metadata_errors="replace") as container:
            track = container.streams.best("audio")
            if track is None:
                raise ValueError("it has no audio track")
            if track.codec_context is None:
                raise ValueError("FFmpeg does not know the codec of its audio track")
            yield container, track
    except av.FFmpegError as error:
        raise ValueError(f"{error.strerror} (FFmpeg)") from error


def _exact_seconds(container: Any, track: Any) -> float | None:
    """The length in the header, if the format stores it; that of AAC, AMR and MPEG streams is a guess."""
    is_mp4, is_matroska = "mp4" in container.format.name, "matroska" in container.format.name
    if is_mp4 and track.duration and container.duration:
        return min(float(track.duration * track.time_base), container.duration / 1e6)
    # Matroska stores the length of all tracks together: a video may be longer than its sound.
    return container.duration / 1e6 if is_matroska and container.duration and len(container.streams) == 1 else None
