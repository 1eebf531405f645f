"""Rows of a window: the utterances that can be used, and the features and labels of those in a window."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..languages.tags import prompt_code
from .features import example_features
from .labels import encode_labels, encode_prompt, encode_segments
from .no_speech import NoSpeech
from .rows import KEPT, OUTCOMES, RowReader, UnusableRow, text_column_of
from .runs import heard_before, link_utterances, pauses_before, runs_of_window
from .segments import Segment
from .teacher_columns import TeacherColumns
from .windows import Window, WindowPlan

logger = logging.getLogger(__name__)

_MAX_PROMPT = 224  # tokens with <|startofprev|>: half of the decoder, as in Whisper's own training


class Utterance(NamedTuple):
    """A usable row: where it is, how long it is, and what is said."""

    row: int
    seconds: float
    text: str
    language: str
    speaker: Any
    tokens: int  # of the text alone
    part: Segment | None = None  # of its recording
    before: int | None = None  # the utterance that this one follows in its recording

    @property
    def group(self) -> tuple[str, Any]:
        """Utterances of one group may share a window."""
        return self.language, self.speaker


@dataclass(frozen=True)
class WindowRows:
    """The arguments of `pack_utterances`, and what is done with a row and with a window."""

    processor: Any
    teacher_columns: TeacherColumns | None
    language: str | None
    prompt_language: str | Mapping[str, str] | None
    task: str
    max_seconds: float
    timestamps: float
    seed: int
    single: float
    previous_text: float
    no_speech: float
    audio_column: str
    text_column: str
    language_column: str
    speaker_column: str | None
    max_label_length: int

    @property
    def sampling_rate(self) -> int:
        return self.processor.feature_extractor.sampling_rate

    def reader(self, dataset: Any) -> RowReader:
        """The reader of a dataset's rows. Raises a `ValueError` for bad settings and missing columns."""
        settings = {
            "tokenizer": self.processor.tokenizer,
            "language": self.language,
            "prompt_language": self.prompt_language,
            "task": self.task,
            "audio_column": self.audio_column,
            "text_column": self.text_column,
            "language_column": self.language_column,
            "max_label_length": self.max_label_length - 1,  # with timestamps there is one token more
            "no_speech": self.no_speech > 0,
        }
        if not hasattr(dataset, "__len__"):
            settings["text_column"] = text_column_of(dataset.column_names or (), self.text_column)
            return RowReader(**settings, array_type=None, files="")
        if self.speaker_column is not None and self.speaker_column not in dataset.column_names:
            raise ValueError(
                f"the dataset has no column {self.speaker_column!r}; it has "
                f"{', '.join(map(repr, dataset.column_names))}: set speaker_column to one of them, or leave it out"
            )
        return RowReader.of(dataset, **settings)

    # ------------------------------------------------------------------ rows

    def usable(
        self, rows: Iterable[dict[str, Any]], reader: RowReader, start: int = 0
    ) -> tuple[list[Utterance], list[int], dict[str, int]]:
        """
        The rows that can be used, and counts of outcomes. The others are named in warnings.

        Returns:
            `tuple`: the utterances, the rows without speech, and the counts.
        """
        counts = dict.fromkeys(OUTCOMES, 0)
        utterances, clips = [], []
        for index, row in enumerate(rows, start):
            try:
                utterance = self._utterance(row, index, reader)
                if utterance.text:
                    utterances.append(utterance)
                else:
                    clips.append(index)
                counts[KEPT] += 1
            except UnusableRow as unusable:
                counts[unusable.outcome] = counts.get(unusable.outcome, 0) + 1
                logger.warning("dropped: %s", unusable)
        if clips:
            logger.info("%d rows have no text: they are heard as recordings without speech (no_speech)", len(clips))
        return link_utterances(utterances), clips, counts

    def _utterance(self, row: dict[str, Any], index: int, reader: RowReader) -> Utterance:
        language, labels = reader.labels(row, index)
        seconds = reader.seconds(row, index)
        text = (row[reader.text_column] or "").strip()
        if text and seconds > self.max_seconds:
            problem = f"{seconds:.1f} s of audio, longer than a window of {self.max_seconds:g} s"
            raise UnusableRow("too_long", f"{reader.name(row, index)}: {problem}")
        speaker = None if self.speaker_column is None else row[self.speaker_column]
        return Utterance(index, seconds, text, language, speaker, len(labels) - 4, reader.part(row, index))

    # ------------------------------------------------------------------ windows

    def plan(self, utterances: Sequence[Utterance], seed: Any) -> WindowPlan:
        return WindowPlan(
            [utterance.seconds for utterance in utterances],
            [utterance.tokens + 2 for utterance in utterances],  # two timestamps
            [utterance.group for utterance in utterances],
            self.max_seconds,
            self.max_label_length - 3,  # language, task, end
            self.single,
            seed,
            pauses_before(utterances),
        )

    def windows_without_speech(
        self, clips: Sequence[int], languages: Sequence[str], seed: Any, earlier: Mapping[str, int] | None = None
    ) -> NoSpeech:
        return NoSpeech(clips, languages, self.no_speech, self.max_seconds, seed, earlier)

    def row_without_speech(
        self, no_speech: NoSpeech, index: int, first: int, read: Callable[[int, None], np.ndarray], epoch: int
    ) -> dict[str, Any]:
        """Features and empty labels of a window without speech. Those with speech are before `first`."""
        samples = no_speech.samples(index - first, epoch, lambda row: read(row, None), self.sampling_rate)
        language, tokenizer = no_speech.languages[index - first], self.processor.tokenizer
        prompt = prompt_code(language, self.prompt_language)
        # No <|nospeech|>: Whisper predicts it in the place of the language, which `generate` fills itself.
        if random.Random(f"{self.seed} {epoch} no speech {index}").random() < self.timestamps:
            labels = encode_segments(tokenizer, [], prompt, self.task)
        else:
            labels = encode_labels(tokenizer, "", prompt, self.task)
        row = example_features(samples, labels, self.processor, self.teacher_columns)
        return row | {"text": "", "language": language, "index": index}

    def row(
        self,
        windows: list[Window],
        index: int,
        utterances: Sequence[Utterance],
        read: Callable[[int, tuple[float, float] | None], np.ndarray],
        epoch: int,
    ) -> dict[str, Any]:
        """Features and labels of a window."""
        window = windows[index]
        members = [utterances[member] for member in window.utterances]
        draws = random.Random(f"{self.seed} {epoch} {members[0].row}")
        has_timestamps, has_previous = draws.random() < self.timestamps, draws.random() < self.previous_text
        text = " ".join(member.text for member in members)
        tokenizer, language = self.processor.tokenizer, members[0].language
        prompt = prompt_code(language, self.prompt_language)
        if has_timestamps:
            # language, task, two timestamps for each text, the start of a segment that is cut, and the end
            has_room = sum(member.tokens + 2 for member in members) + 4 <= self.max_label_length
            cut = window.cut if has_room else None
            samples, times = self._join(window, utterances, read, sum(cut or ()))
            segments = [(start, end, member.text) for (start, end), member in zip(times, members, strict=True)]
            open_start = None if cut is None else times[-1][1] + cut[0]
            labels = encode_segments(tokenizer, segments, prompt, self.task, open_start)
        else:
            samples, _ = self._join(window, utterances, read)
            labels = encode_labels(tokenizer, text, prompt, self.task)
        row = example_features(samples, labels, self.processor, self.teacher_columns)
        row |= {"text": text, "language": language, "index": index}
        previous = heard_before(members[0], utterances)
        if not previous and windows[index - 1] is not window:
            previous = [utterances[member] for member in windows[index - 1].utterances]
        if has_previous and previous and previous[0].group == members[0].group:
            room = min(_MAX_PROMPT, self.max_label_length - len(labels))
            row["prompt_ids"] = encode_prompt(tokenizer, " ".join(one.text for one in previous), room)
            if self.teacher_columns is not None and self.teacher_columns.vocabulary is not None:
                row["teacher_prompt_ids"] = self.teacher_columns.vocabulary.teacher_labels(row["prompt_ids"])
        return row

    def _join(
        self,
        window: Window,
        utterances: Sequence[Utterance],
        read: Callable[[int, tuple[float, float] | None], np.ndarray],
        rest: float = 0.0,
    ) -> tuple[np.ndarray, list[tuple[float, float]]]:
        """
        The samples [samples] of a window, and start and end of each utterance in seconds.

        `rest` are the seconds of the recording to hear after the last utterance.
        """
        rate = self.sampling_rate
        parts: list[np.ndarray] = []
        times: list[tuple[float, float]] = []
        position = 0
        runs = runs_of_window(window, utterances)
        for number, (gap, run) in enumerate(runs, start=1):
            first, last, lead = run[0].part, run[-1].part, 0.0
            heard = None
            if first is not None and last is not None:
                lead = min(gap, first.pause)  # the recording instead of silence, as hand-made times may be late
                heard = first.start - lead, last.end + (rest if number == len(runs) else 0.0)
            samples = read(run[0].row, heard)
            parts += [np.zeros(round((gap - lead) * rate), dtype=np.float32), samples]
            start = position + len(parts[-2])
            position = start + len(samples)
            if heard is None:
                times.append((start / rate, position / rate))
            else:
                offset = start / rate - heard[0]
                times += [(member.part.start + offset, member.part.end + offset) for member in run if member.part]
        return np.concatenate(parts), times
