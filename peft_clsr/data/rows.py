"""Rows of a dataset: what headers and transcripts tell of them before features are computed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..extras import require
from ..files import existing_path
from ..languages.tags import language_tag, prompt_code
from .audio import EmptyAudioError, audio_name, audio_seconds, read_audio
from .labels import check_transcript, encode_labels
from .segments import END_COLUMN, START_COLUMN, BadSegment, Segment, find_segments
from .table_reader import log_once

if TYPE_CHECKING:
    import datasets

KEPT = "kept"
CUT = "cut"  # kept, too
OUTCOMES = (
    *(KEPT, "unreadable", "empty", "too_long", CUT, "labels_too_long", "no_text", "special_tokens"),
    "unknown_language",
)  # counted only where there are some: "bad_times", "overlap", "beyond_audio"
# The line of a row in its table or subtitle file, for messages.
PLACE_COLUMN = "place"
TEXT_COLUMN, OTHER_TEXT_COLUMN = "transcription", "text"


class UnusableRow(ValueError):
    """A row that is left out: `outcome` says why in a word, the message in a sentence that names the row."""

    def __init__(self, outcome: str, problem: str) -> None:
        super().__init__(problem)
        self.outcome = outcome


@dataclass
class RowReader:
    """
    Reads labels and audio of a row. As the function of `Dataset.map`, it checks a row without decoding its audio.

    A row with `start` and `end` in seconds is only this part of its recording.

    Args:
        tokenizer (`WhisperTokenizer`): The student's.
        language (`str`, *optional*): The language of all rows. By default, that in the row's `language_column`.
        task (`str`): "transcribe" or "translate".
        audio_column (`str`): Audio as [`read_audio`] takes it.
        text_column (`str`): Transcripts.
        language_column (`str`): Languages, as in [`language_tag`].
        max_label_length (`int`): Longest labels, in tokens.
        array_type (`str`, *optional*): Type of samples in the dataset, which rows of Python lists do not tell.
        files (`str`): From [`files_digest`]. `datasets` hashes it with this object, so a changed file is read again.
        prompt_language (`str` or `Mapping[str, str]`, *optional*): As in [`prepare_dataset`].
        segments (`dict`): From [`find_segments`], for rows that are parts of recordings.
        no_speech (`bool`, *optional*, defaults to `False`): Rows without text are recordings without speech.
    """

    tokenizer: Any
    language: str | None
    task: str
    audio_column: str
    text_column: str
    language_column: str
    max_label_length: int
    array_type: str | None
    files: str
    prompt_language: str | Mapping[str, str] | None = None
    segments: dict[int, Segment | BadSegment] = field(default_factory=dict)
    no_speech: bool = False

    @classmethod
    def of(cls, dataset: datasets.Dataset, **settings: Any) -> RowReader:
        """The reader of an undecoded dataset. Raises a `ValueError` for bad settings and missing columns."""
        column = settings["audio_column"]
        settings["text_column"] = text_column_of(dataset.column_names, settings["text_column"])
        _check_columns(dataset, settings["language"], column, settings["text_column"], settings["language_column"])
        array_type = _array_type(dataset.features[column])
        reader = cls(**settings, array_type=array_type, files=files_digest(dataset, column))
        # A bad task or language fails here, not in a worker.
        reader.encode("", "en" if reader.language is None else reader.language)
        times = [name for name in (START_COLUMN, END_COLUMN) if name in dataset.column_names]
        if len(times) == 1:
            log_once(f"the dataset has a column {times[0]!r} alone, so each row is taken as a whole recording")
        return reader.with_segments(dataset.select_columns([column, *times])) if len(times) == 2 else reader

    def with_segments(self, rows: Iterable[dict[str, Any]], start: int = 0) -> RowReader:
        """The reader of these rows, numbered from `start`, with the times of those that have some."""
        found = find_segments(
            enumerate(rows, start), self.audio_column, lambda example: audio_seconds(self._audio(example))
        )
        return replace(self, segments=found)

    def __call__(self, example: dict[str, Any], index: int) -> dict[str, Any]:
        row = {"name": self.name(example, index), "outcome": KEPT, "problem": "", "seconds": 0.0}
        try:
            self.labels(example, index)
            return {**row, "seconds": self.seconds(example, index)}
        except UnusableRow as unusable:
            return {**row, "outcome": unusable.outcome, "problem": str(unusable)}

    def labels(self, example: dict[str, Any], index: int) -> tuple[str, list[int]]:
        """The tag of the language, and the labels [tokens]. Raises [`UnusableRow`]."""
        text, name = example[self.text_column] or "", self.name(example, index)
        if not text.strip() and not self.no_speech:
            raise UnusableRow("no_text", f"{name}: no text in column {self.text_column!r}")
        try:
            check_transcript(self.tokenizer, text)
        except ValueError as error:
            raise UnusableRow("special_tokens", f"{name}: {error}") from error
        language = example[self.language_column] if self.language is None else self.language
        try:
            labels = self.encode(text, language)
        except ValueError as error:
            raise UnusableRow("unknown_language", f"{name}: {error}") from error
        if len(labels) > self.max_label_length:
            problem = f"{name}: labels of {len(labels)} tokens, longer than {self.max_label_length}"
            raise UnusableRow("labels_too_long", problem)
        return language_tag(language), labels

    def encode(self, text: str, language: str) -> list[int]:
        """The labels [tokens] of a transcript. Raises a `ValueError` for a bad language or task."""
        return encode_labels(self.tokenizer, text, prompt_code(language, self.prompt_language), self.task)

    def seconds(self, example: dict[str, Any], index: int) -> float:
        """The length of the audio, from its header or its times. Raises [`UnusableRow`]."""
        part = self.part(example, index)
        return self._read(audio_seconds, example, index) if part is None else part.end - part.start

    def samples(
        self, example: dict[str, Any], index: int, sampling_rate: int, times: tuple[float, float] | None = None
    ) -> np.ndarray:
        """float32 [samples] at a rate in Hz, of the row or between two times. Raises [`UnusableRow`]."""
        part = self.part(example, index)
        if times is None and part is not None:
            times = part.start, part.end
        return self._read(read_audio, example, index, sampling_rate, *(times or ()))

    def part(self, example: dict[str, Any], index: int) -> Segment | None:
        """The part of the recording that the row is; `None` for a whole one. Raises [`UnusableRow`]."""
        segment = self.segments.get(index)
        if isinstance(segment, BadSegment):
            raise UnusableRow(segment.outcome, f"{self.name(example, index)}: {segment.problem}")
        return segment

    def name(self, example: dict[str, Any], index: int) -> str:
        name = f"item {index}, {audio_name(example[self.audio_column])}"
        if index not in self.segments:
            return name
        place = f" ({example[PLACE_COLUMN]})" if example.get(PLACE_COLUMN) else ""
        return f"{name}, {example[START_COLUMN]} to {example[END_COLUMN]}{place}"

    def _read(self, read: Callable[..., Any], example: dict[str, Any], index: int, *args: Any) -> Any:
        try:
            return read(self._audio(example), *args)
        except ValueError as error:
            outcome = "empty" if isinstance(error, EmptyAudioError) else "unreadable"
            raise UnusableRow(outcome, f"item {index}: {error}") from error

    def _audio(self, example: dict[str, Any]) -> Any:
        audio = example[self.audio_column]
        if self.array_type is None or not isinstance(audio, dict) or audio.get("array") is None:
            return audio
        try:
            return {**audio, "array": np.asarray(audio["array"], dtype=self.array_type)}
        except (TypeError, ValueError):
            return audio  # read_audio says what is wrong


def text_column_of(columns: Sequence[str], text_column: str) -> str:
    """The column of transcripts: "text", if the default, "transcription", is not there."""
    is_other = text_column == TEXT_COLUMN not in columns and OTHER_TEXT_COLUMN in columns
    return OTHER_TEXT_COLUMN if is_other else text_column


def check_rows(
    dataset: datasets.Dataset, reader: RowReader, num_proc: int | None = None, desc: str = "checking"
) -> datasets.Dataset:
    """
    Check all rows without decoding audio, with a progress bar.

    Returns:
        `datasets.Dataset`: for each row `name`, `outcome` (one of `OUTCOMES`), `problem` (a sentence, or empty) and
        `seconds`.
    """
    types = require("datasets")
    columns = {name: types.Value("string") for name in ("name", "outcome", "problem")}
    columns["seconds"] = types.Value("float64")
    return dataset.map(
        reader,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=types.Features(columns),
        num_proc=num_proc,
        writer_batch_size=1000,
        desc=desc,
    )


def outcomes_at_context(
    checks: datasets.Dataset, context: float | None, any_length: Collection[int] = ()
) -> tuple[list[str], list[str]]:
    """
    Tell what becomes of checked rows at a context in seconds, or without a limit. The rows `any_length` have none.

    Returns:
        `tuple`: for each row its outcome, and a sentence that says why it is dropped, or "".
    """
    outcomes, problems = checks["outcome"][:], checks["problem"][:]
    for index, (name, seconds) in enumerate(zip(checks["name"], checks["seconds"], strict=True)):
        if context is not None and seconds > context and index not in any_length:
            outcomes[index] = "too_long"
            problems[index] = f"{name}: {seconds:.1f} s of audio, longer than the context of {context:g} s"
    return outcomes, problems


def count_outcomes(outcomes: Sequence[str]) -> dict[str, int]:
    """How many rows have each outcome. "kept" includes those that are cut."""
    counts = dict.fromkeys(OUTCOMES, 0)
    for outcome in outcomes:
        counts[outcome] = counts.get(outcome, 0) + 1
    counts[KEPT] += counts[CUT]
    return counts


def describe_dropped(counts: dict[str, int]) -> str:
    """Such as "3 unreadable, 1 no_text"."""
    dropped = (f"{count} {outcome}" for outcome, count in counts.items() if count and outcome not in (KEPT, CUT))
    return ", ".join(dropped) or "none dropped"


def check_dropped(
    counts: dict[str, int], total: int, problems: Sequence[str], max_dropped: float, remedy: str
) -> None:
    """
    Check that enough rows are left.

    Args:
        counts (`dict[str, int]`): From [`count_outcomes`].
        total (`int`): Rows of the dataset.
        problems (`Sequence[str]`): A sentence for each dropped row, of which the first are quoted.
        max_dropped (`float`): The largest share that may be dropped.
        remedy (`str`): How to allow more.

    Raises:
        ValueError: no row is left, or more than `max_dropped` are dropped.
    """
    named = "; ".join(problems[:3]) + ("; ..." if len(problems) > 3 else "")
    if not counts[KEPT]:
        raise ValueError(f"no item of the {total} in the dataset can be used ({describe_dropped(counts)}): {named}")
    dropped = total - counts[KEPT]
    if dropped > max_dropped * total:
        raise ValueError(
            f"{dropped} of {total} items cannot be used ({describe_dropped(counts)}), more than {max_dropped:.0%} of "
            f"them: {named}. Mend these items, or {remedy} to go on without them"
        )


def files_digest(dataset: datasets.Dataset, audio_column: str) -> str:
    """
    Hash the size and times of all audio files of a dataset.

    `datasets` caches by rows, which hold only paths. 100,000 files take about a second.
    """
    digest = hashlib.sha256()
    for table in dataset.select_columns(audio_column).with_format("arrow").iter(batch_size=1000):
        for chunk in table[audio_column].chunks:
            for path in _paths(chunk):
                digest.update(_stamp(path).encode())
    return digest.hexdigest()


def without_decoding(dataset: datasets.Dataset, audio_column: str) -> datasets.Dataset:
    """The dataset with undecoded audio. datasets would need FFmpeg, and one bad file would end the whole map."""
    types = require("datasets")
    feature = dataset.features.get(audio_column)
    if isinstance(feature, types.Audio) or getattr(feature, "dtype", None) == "string":
        dataset = dataset.cast_column(audio_column, types.Audio(decode=False))
    return dataset.with_format(None)


def _paths(column: Any) -> Iterator[str | None]:
    """The paths in a pyarrow column of audio, without those of rows that hold the audio itself."""
    import pyarrow.compute as pc  # installed with datasets

    fields = [field.name for field in column.type] if hasattr(column, "field") else []
    if not fields:
        yield from column.to_pylist() if str(column.type) in ("string", "large_string") else ()
    elif "path" in fields:
        paths = column.field("path")
        for content in ("bytes", "array"):
            if content in fields:
                paths = pc.if_else(pc.is_valid(column.field(content)), None, paths)
        yield from paths.to_pylist()


def _stamp(path: str | None) -> str:
    if path is None:
        return "-"
    try:
        status = os.stat(existing_path(path))
    except (OSError, ValueError):
        return "missing;"
    # With the time of its last change: a file that is moved here keeps the time at which it was written.
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns};"


def _array_type(feature: Any) -> str | None:
    """The type of samples in a column of `{"array", ...}`."""
    feature = feature.get("array") if isinstance(feature, dict) else None
    while hasattr(feature, "feature"):
        feature = feature.feature
    return getattr(feature, "dtype", None)


def _check_columns(
    dataset: datasets.Dataset, language: str | None, audio_column: str, text_column: str, language_column: str
) -> None:
    columns = {"audio_column": audio_column, "text_column": text_column}
    if language is None:
        columns["language_column"] = language_column
    for argument, column in columns.items():
        if column not in dataset.column_names:
            instead = "give a language (such as 'ca') or set" if argument == "language_column" else "set"
            raise ValueError(
                f"the dataset has no column {column!r}; it has {', '.join(map(repr, dataset.column_names))}: "
                f"{instead} {argument} (--{argument}) to one of them"
            )
        kind = getattr(dataset.features[column], "dtype", None)
        if argument != "audio_column" and kind not in ("string", "large_string"):
            raise ValueError(f"column {column!r} holds {kind or dataset.features[column]}; expected text (string)")
