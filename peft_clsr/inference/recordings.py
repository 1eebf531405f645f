"""Finds the recordings of files, folders and tables, and the files for their transcripts."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.audio import TruncatedAudioError, audio_seconds, read_audio
from ..data.segments import END_COLUMN, START_COLUMN
from ..data.table_files import AUDIO_SUFFIXES
from ..data.table_reader import TABLE_SUFFIXES, log_once
from ..data.tables import read_table
from ..files import existing_path
from .subtitles import SUFFIXES


@dataclass
class Recording:
    """
    A file to transcribe.

    Args:
        path (`Path`): The file.
        output (`Path`, *optional*): The file for its transcript. By default it is printed.
        language (`str`, *optional*): The tag of its language, if known.
        seconds (`float`): Its length, after [`split_readable`].
    """

    path: Path
    output: Path | None
    language: str | None
    seconds: float = 0.0


def find_recordings(
    inputs: Sequence[Path],
    output_dir: Path | None = None,
    output_format: str = "text",
    language: str | None = None,
) -> list[Recording]:
    """
    Find recordings, and the file for each transcript.

    Args:
        inputs (`Sequence[Path]`): Files of any name, folders, whose audio files are taken, and tables.
        output_dir (`Path`, *optional*): The folder for transcripts. A recording keeps its relative path there.
        output_format (`str`, *optional*, defaults to `"text"`): "text", "srt", "vtt" or "json".
        language (`str`, *optional*): For recordings whose table gives none.

    Raises:
        ValueError: an input does not exist, there is no recording, tables give one several languages, or two
            transcripts would be one file.
        OSError: a folder or table cannot be read.
    """
    found: dict[Path, tuple[Path, str | None]] = {}  # its relative path in the output, and the language of its table

    def add(path: Path, relative: Path, tag: str | None = None) -> None:
        relative, other = found.get(path, (relative, None))
        if tag and other and tag != other:
            raise ValueError(
                f"{path} has the languages {other!r} and {tag!r}: it is transcribed whole, so give it one, or cut it"
            )
        found[path] = (relative, tag or other)

    for given in map(existing_path, inputs):
        if not given.exists():
            raise ValueError(f"{given} does not exist: give audio files, folders of them, or tables of them")
        if given.is_dir():
            for path in audio_files(given):
                add(path, path.relative_to(given))
        elif given.suffix.lower() in TABLE_SUFFIXES:
            for path, row in read_table(given, language):
                is_inside = path.is_relative_to(given.parent) and ".." not in path.relative_to(given.parent).parts
                add(path, path.relative_to(given.parent) if is_inside else Path(path.name), row.get("language"))
                if row.get(START_COLUMN, "").strip() and END_COLUMN in row:
                    log_once(
                        f"{given}: the times in {START_COLUMN!r} and {END_COLUMN!r} are not used: recordings are "
                        "transcribed whole"
                    )
        else:
            add(given, Path(given.name))
    if not found:
        raise ValueError(
            f"no recording in {', '.join(map(str, inputs))}: in a folder, files that end in "
            f"{', '.join(sorted(AUDIO_SUFFIXES))} are taken; name others one by one"
        )
    sources: dict[Path, Path] = {}
    recordings = []
    for path, (relative, tag) in found.items():
        output = None
        if output_dir is not None:
            # An unknown ending, as in "talk.2", may be a part of the name.
            name = relative.stem if relative.suffix.lower() in AUDIO_SUFFIXES else relative.name
            output = output_dir / relative.with_name(name + SUFFIXES[output_format])
            other = sources.setdefault(output, path)
            if other.resolve() != path.resolve():
                raise ValueError(
                    f"{other} and {path} would both be written to {output}: rename one, or transcribe them into "
                    "separate folders"
                )
            if other != path:
                continue  # the same file, given twice
        recordings.append(Recording(path, output, tag or language))
    return recordings


def split_readable(recordings: Sequence[Recording]) -> tuple[list[Recording], list[str]]:
    """
    Read the header of each recording, note its length, and check the name of its transcript.

    Returns:
        `tuple`: the recordings that can be transcribed, and for each of the others a message that names it.
    """
    readable, problems = [], []
    for recording in recordings:
        try:
            recording.seconds = audio_seconds(recording.path)
            _check_name(recording)
        except ValueError as error:
            problems.append(str(error))
        else:
            readable.append(recording)
    return readable, problems


def _check_name(recording: Recording) -> None:
    """Raise a `ValueError` if the name of the transcript, or of its folder, is too long for the file system."""
    if recording.output is None:
        return
    folder = next(parent for parent in recording.output.parents if os.path.exists(parent))
    for name in recording.output.relative_to(folder).parts:
        try:
            os.lstat(folder / name)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise ValueError(
                    f"{recording.path}: its transcript would be {recording.output}, a name that is too long here: "
                    "rename the recording"
                ) from error


def audio_files(folder: Path) -> Iterator[Path]:
    """The recordings in a folder and its folders, in order. Raises an `OSError` for one that cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders.sort()
        for name in sorted(names):
            # On other file systems, macOS leaves a "._x.wav" without audio beside each x.wav.
            if Path(name).suffix.lower() in AUDIO_SUFFIXES and not name.startswith("."):
                yield Path(parent, name)


def header_seconds(path: str | Path) -> float:
    """Length of a recording in seconds, as its header says; 0 if it cannot be read."""
    try:
        return audio_seconds(path)
    except ValueError:
        return 0.0


def read_recordings(
    recordings: Sequence[tuple[Path, str | None]], rate: int, warn: Callable[[str], None]
) -> Iterator[tuple[Path, str | None, np.ndarray]]:
    """
    Read recordings. One that is cut off is read as far as it goes, and one that cannot be read is left out.

    Args:
        recordings (`Sequence[tuple[Path, str]]`): Files, and their languages, which are passed on.
        rate (`int`): Samples per second to convert to.
        warn (`Callable`): Gets a message for each unreadable or truncated recording.

    Yields:
        `tuple[Path, str, np.ndarray]`: file, language and waveform, float32 [samples].
    """
    for path, language in recordings:
        try:
            waveform = read_audio(path, rate)
        except TruncatedAudioError as error:
            warn(f"warning: {str(error).removeprefix('audio ')}")
            waveform = error.samples
        except (ValueError, OSError) as error:
            warn(f"skipped: {error}")
            continue
        yield path, language, waveform
