"""From recordings and transcripts to features and labels. Each dropped item is named and counted."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..extras import require
from ..languages import language_code
from ..whisper import context_seconds
from .audio import EmptyAudioError, audio_name, read_audio
from .features import example_features
from .labels import MAX_LABEL_LENGTH, encode_labels
from .teacher_columns import TeacherColumns

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_KEPT = "kept"
_CUT = "cut"  # kept, too
OUTCOMES = (_KEPT, "unreadable", "empty", "too_long", _CUT, "labels_too_long", "no_text", "unknown_language")


def prepare_dataset(
    dataset: datasets.Dataset,
    processor: Any,
    language: str | None = None,
    *,
    teacher_processor: Any | None = None,
    audio_column: str = "audio",
    text_column: str = "transcription",
    language_column: str = "language",
    task: str = "transcribe",
    long_audio: Literal["drop", "cut"] = "drop",
    max_label_length: int = MAX_LABEL_LENGTH,
    num_proc: int | None = None,
    desc: str = "features",
) -> tuple[datasets.Dataset, dict[str, int]]:
    """
    Compute log-mel features and labels of a dataset, with a progress bar.

    Items that cannot be used are dropped. Each is named in a warning and counted. The context is the processor's
    ([`set_audio_context`] cuts it).

    Args:
        dataset (`datasets.Dataset`): Recordings and transcripts.
        processor (`WhisperProcessor`): Its feature extractor and tokenizer are used.
        language (`str`, *optional*):
            Name or code of the language of all rows, "catalan" or "ca". By default, each row's own language is in
            `language_column`.
        teacher_processor (`WhisperProcessor`, *optional*):
            The teacher's, if it may have other mel bins or another vocabulary than the student (large-v3, turbo), or a
            longer context.
        audio_column (`str`, *optional*, defaults to `"audio"`):
            Column of audio: an `Audio` feature, paths, or dicts as in [`read_audio`].
        text_column (`str`, *optional*, defaults to `"transcription"`): Column of transcripts.
        language_column (`str`, *optional*, defaults to `"language"`):
            Column of languages, names or codes. It is read if no `language` is given.
        task (`str`, *optional*, defaults to `"transcribe"`): "transcribe" or "translate".
        long_audio (`str`, *optional*, defaults to `"drop"`):
            "drop" or "cut" audio longer than the context. A cut item keeps its whole transcript.
        max_label_length (`int`, *optional*, defaults to 448): Longest labels, in tokens. Longer ones are dropped.
        num_proc (`int`, *optional*): Processes to use.
        desc (`str`, *optional*, defaults to `"features"`): Name of the progress bar.

    Returns:
        `(datasets.Dataset, dict[str, int])`: The dataset, in torch format, has the columns `input_features`
        float32 [mels, frames], `attention_mask` int [frames] (1 for audio, 0 for padding), `labels` [tokens] (see
        [`encode_labels`]), `text`, `language` (the code) and `index` (the row in `dataset`). With a
        `teacher_processor`, it also has `teacher_input_features` float32 [teacher's mels, frames], if the features
        differ, and `teacher_labels` [tokens], if the vocabularies differ: the teacher's ids of `labels`, -100 for
        tokens that it lacks. The counts are "kept" (cut ones included), "unreadable", "empty", "too_long", "cut",
        "labels_too_long", "no_text" and "unknown_language".

    Raises:
        ValueError:
            The dataset is empty, a column is missing, an argument is unknown, the teacher's context is shorter, or no
            item is left.
    """
    if long_audio not in ("drop", "cut"):
        raise ValueError(f"long_audio {long_audio!r} is unknown: expected 'drop' or 'cut'")
    if len(dataset) == 0:
        split = "" if dataset.split is None else f" (split {str(dataset.split)!r})"
        raise ValueError(f"the dataset is empty{split}: check the name of the split, and what filtered it")
    check_columns(dataset, language, audio_column, text_column, language_column)
    # A bad task or language fails here, not in a worker.
    encode_labels(processor.tokenizer, "", "en" if language is None else language, task)
    teacher_columns = None if teacher_processor is None else TeacherColumns(processor, teacher_processor)
    prepare = _ExamplePreparation(
        processor,
        teacher_columns,
        language,
        task,
        audio_column,
        text_column,
        language_column,
        long_audio,
        max_label_length,
    )
    prepared = (
        without_decoding(dataset, audio_column)
        .with_format(None)
        .map(
            prepare,
            with_indices=True,
            remove_columns=dataset.column_names,
            features=_feature_types(processor, teacher_columns),
            num_proc=num_proc,
            writer_batch_size=32,  # an item of 30 s is 1 MB; the default of 1,000 would hold 1 GB
            desc=desc,
        )
    )
    return _usable_rows(prepared)


def check_columns(
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


def without_decoding(dataset: datasets.Dataset, audio_column: str) -> datasets.Dataset:
    """The dataset with undecoded audio. datasets would need FFmpeg, and one bad file would end the whole map."""
    datasets = require("datasets")
    feature = dataset.features[audio_column]
    if isinstance(feature, datasets.Audio) or getattr(feature, "dtype", None) == "string":
        return dataset.cast_column(audio_column, datasets.Audio(decode=False))
    return dataset


def _feature_types(processor: Any, teacher_columns: TeacherColumns | None) -> datasets.Features:
    datasets = require("datasets")
    extractor = processor.feature_extractor
    types = datasets.Features(
        {
            "input_features": datasets.Array2D((extractor.feature_size, extractor.nb_max_frames), "float32"),
            "attention_mask": datasets.List(datasets.Value("int8"), length=extractor.nb_max_frames),
            "labels": datasets.List(datasets.Value("int64")),
            "text": datasets.Value("string"),
            "language": datasets.Value("string"),
            "index": datasets.Value("int64"),
            "outcome": datasets.Value("string"),
            "problem": datasets.Value("string"),
        }
    )
    if teacher_columns is not None and teacher_columns.extractor is not None:
        shape = (teacher_columns.extractor.feature_size, teacher_columns.extractor.nb_max_frames)
        types["teacher_input_features"] = datasets.Array2D(shape, "float32")
    if teacher_columns is not None and teacher_columns.vocabulary is not None:
        types["teacher_labels"] = datasets.List(datasets.Value("int64"))
    return types


@dataclass
class _ExamplePreparation:
    """Prepares one row, with its outcome. Dropped rows hold zeros, as Arrow needs the fixed shape."""

    processor: Any
    teacher_columns: TeacherColumns | None
    language: str | None
    task: str
    audio_column: str
    text_column: str
    language_column: str
    long_audio: str
    max_label_length: int

    def __call__(self, example: dict[str, Any], index: int) -> dict[str, Any]:
        row = self._empty_row(example, index)
        name = f"item {index}, {audio_name(example[self.audio_column])}"
        if not (example[self.text_column] or "").strip():
            return {**row, "outcome": "no_text", "problem": f"{name}: no text in column {self.text_column!r}"}
        language = example[self.language_column] if self.language is None else self.language
        try:
            labels = encode_labels(self.processor.tokenizer, example[self.text_column], language, self.task)
        except ValueError as error:
            return {**row, "outcome": "unknown_language", "problem": f"{name}: {error}"}
        row["language"] = language_code(language)
        if len(labels) > self.max_label_length:
            problem = f"{name}: labels of {len(labels)} tokens, longer than {self.max_label_length}"
            return {**row, "outcome": "labels_too_long", "problem": problem}
        extractor = self.processor.feature_extractor
        try:
            samples = read_audio(example[self.audio_column], extractor.sampling_rate)
        except EmptyAudioError as error:
            return {**row, "outcome": "empty", "problem": f"item {index}: {error}"}
        except ValueError as error:
            return {**row, "outcome": "unreadable", "problem": f"item {index}: {error}"}
        if len(samples) > extractor.n_samples:
            seconds, context = len(samples) / extractor.sampling_rate, context_seconds(extractor)
            row["problem"] = f"{name}: {seconds:.1f} s of audio, longer than the context of {context:g} s"
            if self.long_audio == "drop":
                return {**row, "outcome": "too_long"}
            row["outcome"] = _CUT
            samples = samples[: extractor.n_samples]
        return row | example_features(samples, labels, self.processor, self.teacher_columns)

    def _empty_row(self, example: dict[str, Any], index: int) -> dict[str, Any]:
        extractor = self.processor.feature_extractor
        row = {
            "input_features": _no_features(extractor),
            "attention_mask": np.zeros(extractor.nb_max_frames, dtype=np.int8),
            "labels": [],
            "text": example[self.text_column],
            "language": None,
            "index": index,
            "outcome": _KEPT,
            "problem": "",
        }
        if self.teacher_columns is not None and self.teacher_columns.extractor is not None:
            row["teacher_input_features"] = _no_features(self.teacher_columns.extractor)
        if self.teacher_columns is not None and self.teacher_columns.vocabulary is not None:
            row["teacher_labels"] = []
        return row


def _no_features(extractor: Any) -> np.ndarray:
    return np.zeros((extractor.feature_size, extractor.nb_max_frames), dtype=np.float32)


def _usable_rows(prepared: datasets.Dataset) -> tuple[datasets.Dataset, dict[str, int]]:
    """The rows that are kept, and the counts of outcomes. Warns of each dropped or cut item."""
    counts = dict.fromkeys(OUTCOMES, 0)
    kept = []
    outcomes = prepared.select_columns(["outcome", "problem"])
    for index, (outcome, problem) in enumerate(zip(outcomes["outcome"], outcomes["problem"], strict=True)):
        counts[outcome] += 1
        if outcome in (_KEPT, _CUT):
            kept.append(index)
        if problem:
            logger.warning("%s: %s", "cut" if outcome == _CUT else "dropped", problem)
    counts[_KEPT] += counts[_CUT]
    if not kept:
        dropped = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        raise ValueError(
            f"no item of the {len(prepared)} in the dataset can be used ({dropped}); the warnings above name them"
        )
    prepared = prepared.remove_columns(["outcome", "problem"])
    if len(kept) < len(prepared):
        prepared = prepared.select(kept)
    return prepared.with_format("torch"), counts
