"""Packs utterances into windows of the context, with or without timestamps."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm

from ..languages.tags import prompt_code
from ..whisper import context_seconds
from .features import example_features
from .labels import MAX_LABEL_LENGTH, encode_labels, encode_prompt, encode_segments
from .no_speech import NoSpeech
from .rows import (
    KEPT,
    OUTCOMES,
    RowReader,
    UnusableRow,
    describe_dropped,
    text_column_of,
    without_decoding,
)
from .runs import heard_before, link_utterances, pauses_before, runs_of_window
from .segments import Segment
from .teacher_columns import TeacherColumns
from .windows import MIN_GAP, Window, WindowPlan

logger = logging.getLogger(__name__)

_BUFFER = 512  # utterances of a stream that are packed together
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


def pack_utterances(
    dataset: Any,
    processor: Any,
    language: str | None = None,
    *,
    max_seconds: float = 30.0,
    timestamps: float = 0.5,
    seed: int = 0,
    single: float = 0.1,
    previous_text: float = 0.1,
    no_speech: float = 0.0,
    audio_column: str = "audio",
    text_column: str = "transcription",
    language_column: str = "language",
    speaker_column: str | None = None,
    prompt_language: str | Mapping[str, str] | None = None,
    task: str = "transcribe",
    teacher_processor: Any | None = None,
    max_label_length: int = MAX_LABEL_LENGTH,
) -> PackedUtterances | PackedStream:
    """
    Pack utterances into windows of up to `max_seconds`, as Whisper pays for its whole context whatever it hears.

    A window has one language, and one speaker where `speaker_column` is given. Each usable utterance is in exactly
    one window an epoch. Order, lengths and gaps (0.1 to 0.6 s of silence before each utterance) depend on `seed` and
    the epoch alone. The number of windows is the same in each epoch. Features are computed when a window is taken,
    and not stored.

    Rows with the columns `start` and `end`, in seconds, are segments of longer recordings. Segments that follow each
    other in a recording stay in this order, with the audio between them. Where the next segment crosses the end of a
    window with timestamps, the labels end with its start. Only the part of a window is read from a recording.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Recordings and transcripts, as for [`prepare_dataset`]. A stream is packed 512 utterances at a time.
        processor (`WhisperProcessor`): Its feature extractor and tokenizer are used.
        language (`str`, *optional*): Language of all rows, as in [`language_tag`]. By default, it is in
            `language_column`.
        max_seconds (`float`, *optional*, defaults to 30.0): Longest window, in seconds; at most the context.
        timestamps (`float`, *optional*, defaults to 0.5): Share of windows with timestamps in their labels.
        seed (`int`, *optional*, defaults to 0): Seed of all draws.
        single (`float`, *optional*, defaults to 0.1): Share of windows that hold one utterance.
        previous_text (`float`, *optional*, defaults to 0.1):
            Share of windows that follow another window's text, as prompt behind `<|startofprev|>`. It has no loss.
        no_speech (`float`, *optional*, defaults to 0.0):
            Share of windows without speech, whose labels are empty. With it, a row without text is a recording without
            speech, of any length. Without such rows, silence and noise are generated.
        audio_column (`str`, *optional*, defaults to `"audio"`): Column of audio, as in [`read_audio`].
        text_column (`str`, *optional*, defaults to `"transcription"`):
            Column of transcripts. If the default is not there, "text" is read.
        language_column (`str`, *optional*, defaults to `"language"`): Column of languages, if no `language` is given.
        speaker_column (`str`, *optional*): Column of speakers.
        prompt_language (`str` or `Mapping[str, str]`, *optional*): As in [`prepare_dataset`].
        task (`str`, *optional*, defaults to `"transcribe"`): "transcribe" or "translate".
        teacher_processor (`WhisperProcessor`, *optional*): The teacher's, as in [`prepare_dataset`].
        max_label_length (`int`, *optional*, defaults to 448): Longest labels with their prompt, in tokens.

    Returns:
        [`PackedUtterances`] or, of a stream, [`PackedStream`]: rows as of [`prepare_dataset`], and `prompt_ids`
        [tokens] in windows that follow a text.

    Raises:
        ValueError: `max_seconds` is longer than the context, a share is outside [0, 1], a column is missing, an
            argument is unknown, or no row can be used.
    """
    for name, share in (("timestamps", timestamps), ("single", single), ("previous_text", previous_text)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}; expected a share of windows from 0 to 1")
    if not 0 <= no_speech < 1:
        raise ValueError(f"no_speech is {no_speech}; expected a share of windows from 0 to less than 1, such as 0.05")
    context = context_seconds(processor.feature_extractor)
    if not 0 < max_seconds <= context:
        raise ValueError(
            f"max_seconds is {max_seconds}; expected more than 0, and at most the context of {context:g} s"
        )
    if timestamps > 0:  # a tokenizer without them is known now, not in the middle of a training
        prompt = "en" if language is None else prompt_code(language, prompt_language)
        encode_segments(processor.tokenizer, [(0.0, max_seconds, "")], prompt, task)
    packing = _Packing(
        processor=processor,
        teacher_columns=None if teacher_processor is None else TeacherColumns(processor, teacher_processor),
        language=language,
        prompt_language=prompt_language,
        task=task,
        max_seconds=max_seconds,
        timestamps=timestamps,
        seed=seed,
        single=single,
        previous_text=previous_text,
        no_speech=no_speech,
        audio_column=audio_column,
        text_column=text_column,
        language_column=language_column,
        speaker_column=speaker_column,
        max_label_length=max_label_length,
    )
    if not hasattr(dataset, "__len__"):
        return PackedStream(dataset, packing)
    return PackedUtterances(dataset, packing)


class PackedUtterances(Dataset):
    """
    Windows of utterances, see [`pack_utterances`]. `set_epoch` draws other windows.

    Attributes:
        languages (`list[str]`): The language of each window, the same in each epoch.
        counts (`dict[str, int]`): Rows by outcome: "kept", and why others were left out, as of [`prepare_dataset`].
        seconds (`float`): Length of all kept utterances together.
    """

    def __init__(self, dataset: Any, packing: _Packing) -> None:
        self._dataset = without_decoding(dataset, packing.audio_column)
        self._packing, self._reader = packing, packing.reader(self._dataset)
        rows = tqdm(self._dataset, desc="lengths", disable=None)
        self._utterances, clips, self.counts = packing.usable(rows, self._reader)
        if not self._utterances:
            raise ValueError(
                f"no row of the {len(dataset)} in the dataset can be used ({describe_dropped(self.counts)}); the "
                "warnings above name them"
            )
        self.seconds = sum(utterance.seconds for utterance in self._utterances)
        self._plan = packing.plan(self._utterances, packing.seed)
        first = self._plan.windows(0)
        self.languages = [self._utterances[window.utterances[0]].language for window in first]
        self._no_speech = packing.windows_without_speech(clips, self.languages, packing.seed)
        self.languages += self._no_speech.languages
        # Shared with the workers of a DataLoader, which may outlive an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._planned: tuple[int, list[Window]] = (0, first)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the windows."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.languages)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        Compute the features and labels of a window.

        Returns:
            `dict`: `input_features`, `attention_mask`, `labels`, `text`, `language` and `index` (the window), as of
            [`prepare_dataset`], and `prompt_ids` [tokens], if the window follows another one's text.
        """
        return self.window(int(self._epoch), index)

    def window(self, epoch: int, index: int) -> dict[str, Any]:
        """Compute the features and labels of a window of any epoch."""
        if self._planned[0] != epoch:
            self._planned = (epoch, self._plan.windows(epoch))
        windows = self._planned[1]
        index = range(len(self))[index]  # negative ones, and an IndexError past the end, which ends an iteration
        if index >= len(windows):
            return self._packing.row_without_speech(self._no_speech, index, len(windows), self._samples, epoch)
        return self._packing.row(windows, index, self._utterances, self._samples, epoch)

    def settings(self) -> dict[str, Any]:
        """What decides the windows of all epochs: arguments, the number of windows, and a digest of all utterances."""
        arguments = {item.name: getattr(self._packing, item.name) for item in fields(self._packing)}
        plain = {
            name: value
            for name, value in arguments.items()
            if name not in ("processor", "teacher_columns") and not name.endswith("_column")
        }
        digest = hashlib.sha256(repr(self._utterances).encode()).hexdigest()
        return {**plain, "number": len(self), "hash of utterances": digest[:16]}

    def _samples(self, row: int, times: tuple[float, float] | None) -> np.ndarray:
        return self._reader.samples(self._dataset[row], row, self._packing.sampling_rate, times)


class PackedStream(IterableDataset):
    """Windows of a stream, see [`pack_utterances`]. 512 utterances are packed together."""

    def __init__(self, stream: Iterable[dict[str, Any]], packing: _Packing) -> None:
        if hasattr(stream, "decode"):
            stream = stream.decode(False)  # datasets would need FFmpeg
        self._stream = stream
        self._packing = packing
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the windows, here and on the stream."""
        self._epoch.fill_(epoch)
        if hasattr(self._stream, "set_epoch"):
            self._stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        packing, epoch = self._packing, int(self._epoch)
        reader, rows = packing.reader(self._stream), iter(self._stream)
        for start in count(0, _BUFFER):
            buffer = list(islice(rows, _BUFFER))
            if not buffer:
                return
            reader = reader.with_segments(buffer, start)
            utterances, clips, _ = packing.usable(buffer, reader, start)
            seed = f"{packing.seed} {start}"
            windows = packing.plan(utterances, seed).windows(epoch)
            languages = [utterances[window.utterances[0]].language for window in windows]
            silent = packing.windows_without_speech(clips, languages, seed)

            read = partial(self._samples, reader, buffer, start)
            for index in range(len(windows)):
                yield packing.row(windows, index, utterances, read, epoch)
            for index in range(len(windows), len(windows) + len(silent.languages)):
                yield packing.row_without_speech(silent, index, len(windows), read, epoch)

    def _samples(
        self, reader: RowReader, buffer: list[dict[str, Any]], start: int, row: int, times: tuple[float, float] | None
    ) -> np.ndarray:
        return reader.samples(buffer[row - start], row, self._packing.sampling_rate, times)


@dataclass(frozen=True)
class _Packing:
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
        if text and seconds + MIN_GAP > self.max_seconds:
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

    def windows_without_speech(self, clips: Sequence[int], languages: Sequence[str], seed: Any) -> NoSpeech:
        return NoSpeech(clips, languages, self.no_speech, self.max_seconds, seed)

    def row_without_speech(
        self, no_speech: NoSpeech, index: int, first: int, read: Callable[[int, None], np.ndarray], epoch: int
    ) -> dict[str, Any]:
        """Features and empty labels of a window without speech. Those with speech are before `first`."""
        samples = no_speech.samples(index - first, epoch, lambda row: read(row, None), self.sampling_rate)
        language, tokenizer = no_speech.languages[index - first], self.processor.tokenizer
        prompt = prompt_code(language, self.prompt_language)
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
