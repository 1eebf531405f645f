"""Packs utterances into windows of the context, with or without timestamps."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm

from ..languages.tags import prompt_code
from ..whisper import context_seconds
from .labels import MAX_LABEL_LENGTH, encode_segments
from .rows import RowReader, describe_dropped, without_decoding
from .teacher_columns import TeacherColumns
from .window_rows import WindowRows
from .windows import Window

_BUFFER = 512  # utterances of a stream that are packed together


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
            Share of windows without speech, whose labels are empty; above 0, each language has one at least. With it,
            a row without text is a recording without speech, of any length: leave out those that are not yet
            transcribed. Without such rows, silence and noise are generated. OpenAI's generation config forbids an
            empty transcript. To allow it, `generate` without timestamps needs
            `model.generation_config.begin_suppress_tokens = [220]`.
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
        [`PackedUtterances`] or [`PackedStream`]: rows as of [`prepare_dataset`], and `prompt_ids`
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
    packing = WindowRows(
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

    def __init__(self, dataset: Any, packing: WindowRows) -> None:
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
        """The settings of the windows of all epochs: arguments, number of windows, and a digest of all utterances."""
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

    def __init__(self, stream: Iterable[dict[str, Any]], packing: WindowRows) -> None:
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
        earlier: Counter[str] = Counter()
        for start in count(0, _BUFFER):
            buffer = list(islice(rows, _BUFFER))
            if not buffer:
                return
            reader = reader.with_segments(buffer, start)
            utterances, clips, _ = packing.usable(buffer, reader, start)
            seed = f"{packing.seed} {start}"
            windows = packing.plan(utterances, seed).windows(epoch)
            languages = [utterances[window.utterances[0]].language for window in windows]
            silent = packing.windows_without_speech(clips, languages, seed, earlier)
            earlier.update(languages)

            read = partial(self._samples, reader, buffer, start)
            for index in range(len(windows)):
                yield packing.row(windows, index, utterances, read, epoch)
            for index in range(len(windows), len(windows) + len(silent.languages)):
                yield packing.row_without_speech(silent, index, len(windows), read, epoch)

    def _samples(
        self, reader: RowReader, buffer: list[dict[str, Any]], start: int, row: int, times: tuple[float, float] | None
    ) -> np.ndarray:
        return reader.samples(buffer[row - start], row, self._packing.sampling_rate, times)
