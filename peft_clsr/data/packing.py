"""Packs utterances into windows of the context, with or without timestamps."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from .rows import KEPT, OUTCOMES, RowReader, UnusableRow, describe_dropped, without_decoding
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
        audio_column (`str`, *optional*, defaults to `"audio"`): Column of audio, as in [`read_audio`].
        text_column (`str`, *optional*, defaults to `"transcription"`): Column of transcripts.
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
    context = context_seconds(processor.feature_extractor)
    if not 0 < max_seconds <= context:
        raise ValueError(
            f"max_seconds is {max_seconds}; expected more than 0, and at most the context of {context:g} s"
        )
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
        self._utterances, self.counts = packing.usable(rows, self._reader)
        if not self._utterances:
            raise ValueError(
                f"no row of the {len(dataset)} in the dataset can be used ({describe_dropped(self.counts)}); the "
                "warnings above name them"
            )
        self.seconds = sum(utterance.seconds for utterance in self._utterances)
        self._plan = packing.plan(self._utterances, packing.seed)
        first = self._plan.windows(0)
        self.languages = [self._utterances[window.utterances[0]].language for window in first]
        # Shared with the workers of a DataLoader, which may outlive an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._planned: tuple[int, list[Window]] = (0, first)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the windows."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        Compute the features and labels of a window.

        Returns:
            `dict`: `input_features`, `attention_mask`, `labels`, `text`, `language` and `index` (the window), as of
            [`prepare_dataset`], and `prompt_ids` [tokens], if the window follows another one's text.
        """
        epoch = int(self._epoch)
        if self._planned[0] != epoch:
            self._planned = (epoch, self._plan.windows(epoch))
        windows = self._planned[1]
        index = range(len(windows))[index]  # negative ones, and an IndexError past the end, which ends an iteration
        return self._packing.row(windows, index, self._utterances, self._samples, epoch)

    def _samples(self, row: int) -> np.ndarray:
        return self._reader.samples(self._dataset[row], row, self._packing.sampling_rate)


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
            utterances, _ = packing.usable(buffer, reader, start)
            windows = packing.plan(utterances, f"{packing.seed} {start}").windows(epoch)

            def samples(row: int, buffer: list[dict[str, Any]] = buffer, start: int = start) -> np.ndarray:
                return reader.samples(buffer[row - start], row, packing.sampling_rate)

            for index in range(len(windows)):
                yield packing.row(windows, index, utterances, samples, epoch)


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
        }
        if not hasattr(dataset, "__len__"):
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
    ) -> tuple[list[Utterance], dict[str, int]]:
        """The utterances that can be used, and counts of outcomes. The others are named in warnings."""
        counts = dict.fromkeys(OUTCOMES, 0)
        utterances = []
        for index, row in enumerate(rows, start):
            try:
                utterances.append(self._utterance(row, index, reader))
                counts[KEPT] += 1
            except UnusableRow as unusable:
                counts[unusable.outcome] += 1
                logger.warning("dropped: %s", unusable)
        return utterances, counts

    def _utterance(self, row: dict[str, Any], index: int, reader: RowReader) -> Utterance:
        language, labels = reader.labels(row, index)
        seconds = reader.seconds(row, index)
        if seconds + MIN_GAP > self.max_seconds:
            problem = f"{seconds:.1f} s of audio, longer than a window of {self.max_seconds:g} s"
            raise UnusableRow("too_long", f"{reader.name(row, index)}: {problem}")
        speaker = None if self.speaker_column is None else row[self.speaker_column]
        return Utterance(index, seconds, row[self.text_column].strip(), language, speaker, len(labels) - 4)

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
        )

    def row(
        self,
        windows: list[Window],
        index: int,
        utterances: Sequence[Utterance],
        read: Callable[[int], np.ndarray],
        epoch: int,
    ) -> dict[str, Any]:
        """Features and labels of a window."""
        window = windows[index]
        members = [utterances[member] for member in window.utterances]
        samples, times = self._join(members, window.gaps, read)
        draws = random.Random(f"{self.seed} {epoch} {members[0].row}")
        has_timestamps, has_previous = draws.random() < self.timestamps, draws.random() < self.previous_text
        text = " ".join(member.text for member in members)
        tokenizer, language = self.processor.tokenizer, members[0].language
        prompt = prompt_code(language, self.prompt_language)
        if has_timestamps:
            segments = [(start, end, member.text) for (start, end), member in zip(times, members, strict=True)]
            labels = encode_segments(tokenizer, segments, prompt, self.task)
        else:
            labels = encode_labels(tokenizer, text, prompt, self.task)
        row = example_features(samples, labels, self.processor, self.teacher_columns)
        row |= {"text": text, "language": language, "index": index}
        previous = [utterances[member] for member in windows[index - 1].utterances]
        if has_previous and previous[0].group == members[0].group and windows[index - 1] is not window:
            room = min(_MAX_PROMPT, self.max_label_length - len(labels))
            row["prompt_ids"] = encode_prompt(tokenizer, " ".join(one.text for one in previous), room)
        return row

    def _join(
        self, members: list[Utterance], gaps: Sequence[float], read: Callable[[int], np.ndarray]
    ) -> tuple[np.ndarray, list[tuple[float, float]]]:
        """The samples [samples] of a window, and start and end of each utterance in seconds."""
        rate = self.sampling_rate
        parts: list[np.ndarray] = []
        times, position = [], 0
        for member, gap in zip(members, gaps, strict=True):
            samples = read(member.row)
            parts += [np.zeros(round(gap * rate), dtype=np.float32), samples]
            start = position + len(parts[-2])
            position = start + len(samples)
            times.append((start / rate, position / rate))
        return np.concatenate(parts), times
