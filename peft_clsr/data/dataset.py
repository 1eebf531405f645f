"""From recordings and transcripts to features and labels. Each dropped item is named and counted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..extras import require
from ..whisper import context_seconds
from .features import example_features
from .labels import MAX_LABEL_LENGTH
from .rows import (
    CUT,
    KEPT,
    RowReader,
    UnusableRow,
    check_dropped,
    check_rows,
    count_outcomes,
    describe_dropped,
    outcomes_at_context,
    without_decoding,
)
from .teacher_columns import TeacherColumns

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_REMEDY = "set a larger max_dropped"


def prepare_dataset(
    dataset: datasets.Dataset,
    processor: Any,
    language: str | None = None,
    *,
    prompt_language: str | Mapping[str, str] | None = None,
    teacher_processor: Any | None = None,
    audio_column: str = "audio",
    text_column: str = "transcription",
    language_column: str = "language",
    task: str = "transcribe",
    long_audio: Literal["drop", "cut"] = "drop",
    max_label_length: int = MAX_LABEL_LENGTH,
    max_dropped: float = 1.0,
    num_proc: int | None = None,
    desc: str = "features",
) -> tuple[datasets.Dataset, dict[str, int]]:
    """
    Compute log-mel features and labels of a dataset, with a progress bar.

    Items that cannot be used are dropped. Each is named in a warning and counted. Headers and transcripts are checked
    first, so most are known before the first feature is computed. Features are cached by `datasets` until a row, an
    audio file or an argument changes. The context is the processor's ([`set_audio_context`] cuts it).

    Args:
        dataset (`datasets.Dataset`): Recordings and transcripts.
        processor (`WhisperProcessor`): Its feature extractor and tokenizer are used.
        language (`str`, *optional*):
            The language of all rows, as in [`language_tag`]: "catalan", "ca" or "rw". By default, each row's own
            language is in `language_column`.
        prompt_language (`str` or `Mapping[str, str]`, *optional*):
            The Whisper language whose token stands in the prompt, for a language that Whisper does not know; or one
            for each of several: {"rw": "sw", "hsb": "pl"}. That of the adapter, see [`CLSRConfig`].
        teacher_processor (`WhisperProcessor`, *optional*):
            The teacher's, if it may have other mel bins or another vocabulary than the student (large-v3, turbo), or a
            longer context.
        audio_column (`str`, *optional*, defaults to `"audio"`):
            Column of audio: an `Audio` feature, paths, or dicts as in [`read_audio`].
        text_column (`str`, *optional*, defaults to `"transcription"`): Column of transcripts.
        language_column (`str`, *optional*, defaults to `"language"`):
            Column of languages, names or tags. It is read if no `language` is given.
        task (`str`, *optional*, defaults to `"transcribe"`): "transcribe" or "translate".
        long_audio (`str`, *optional*, defaults to `"drop"`):
            "drop" or "cut" audio longer than the context. A cut item keeps its whole transcript.
        max_label_length (`int`, *optional*, defaults to 448):
            Longest labels, in tokens. Longer ones are dropped. The limit of a model is its
            `config.max_target_positions`, 448 in every published Whisper.
        max_dropped (`float`, *optional*, defaults to 1.0):
            Largest share of items that may be dropped. With 0.1, more than a tenth is an error. By default any.
        num_proc (`int`, *optional*): Processes to use.
        desc (`str`, *optional*, defaults to `"features"`): Name of the progress bar.

    Returns:
        `(datasets.Dataset, dict[str, int])`: The dataset, in torch format, has the columns `input_features`
        float32 [mels, frames], `attention_mask` int [frames] (1 for audio, 0 for padding), `labels` [tokens] (see
        [`encode_labels`]), `text`, `language` (the tag) and `index` (the row in `dataset`). With a
        `teacher_processor`, it also has `teacher_input_features` float32 [teacher's mels, frames], if the features
        differ, and `teacher_labels` [tokens], if the vocabularies differ: the teacher's ids of `labels`, -100 for
        tokens that it lacks. The counts are "kept" (cut ones included), "unreadable", "empty", "too_long", "cut",
        "labels_too_long", "no_text", "special_tokens" and "unknown_language".

    Raises:
        ValueError:
            The dataset is empty, a column is missing, an argument is unknown, the teacher's context is shorter, no
            item is left, or more than `max_dropped` are dropped.
    """
    if long_audio not in ("drop", "cut"):
        raise ValueError(f"long_audio {long_audio!r} is unknown: expected 'drop' or 'cut'")
    if not 0 <= max_dropped <= 1:
        raise ValueError(f"max_dropped is {max_dropped}, expected a share from 0 to 1")
    if len(dataset) == 0:
        split = "" if dataset.split is None else f" (split {str(dataset.split)!r})"
        raise ValueError(f"the dataset is empty{split}: check the name of the split, and what filtered it")
    dataset = without_decoding(dataset, audio_column)
    reader = RowReader.of(
        dataset,
        tokenizer=processor.tokenizer,
        language=language,
        prompt_language=prompt_language,
        task=task,
        audio_column=audio_column,
        text_column=text_column,
        language_column=language_column,
        max_label_length=max_label_length,
    )
    teacher_columns = None if teacher_processor is None else TeacherColumns(processor, teacher_processor)
    known = _check_first(dataset, reader, processor.feature_extractor, long_audio, max_dropped, num_proc, desc)
    prepared = dataset.map(
        _ExamplePreparation(reader, processor, teacher_columns, long_audio),
        with_indices=True,
        remove_columns=dataset.column_names,
        features=_feature_types(processor, teacher_columns),
        num_proc=num_proc,
        writer_batch_size=32,  # an item of 30 s is 1 MB; the default of 1,000 would hold 1 GB
        desc=desc,
    )
    return _usable_rows(prepared, known, max_dropped)


def _check_first(
    dataset: datasets.Dataset,
    reader: RowReader,
    extractor: Any,
    long_audio: str,
    max_dropped: float,
    num_proc: int | None,
    desc: str,
) -> set[int]:
    """Say what headers and transcripts tell, before features are computed. Returns the rows that were named."""
    checks = check_rows(dataset, reader, num_proc, f"{desc}: checking")
    for problem in filter(None, checks["problem"]):
        logger.warning("dropped: %s", problem)
    outcomes, problems = outcomes_at_context(checks, context_seconds(extractor) if long_audio == "drop" else None)
    counts = count_outcomes(outcomes)
    level = logging.INFO if counts[KEPT] == len(checks) else logging.WARNING
    text = "%s: %d of %d items can be used, by their headers and transcripts (%s)"
    logger.log(level, text, desc, counts[KEPT], len(checks), describe_dropped(counts))
    check_dropped(counts, len(checks), list(filter(None, problems)), max_dropped, _REMEDY)
    return {index for index, problem in enumerate(checks["problem"]) if problem}


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

    reader: RowReader
    processor: Any
    teacher_columns: TeacherColumns | None
    long_audio: str

    def __call__(self, example: dict[str, Any], index: int) -> dict[str, Any]:
        row = self._empty_row(example, index)
        extractor = self.processor.feature_extractor
        try:
            row["language"], labels = self.reader.labels(example, index)
            samples = self.reader.samples(example, index, extractor.sampling_rate)
        except UnusableRow as unusable:
            return {**row, "outcome": unusable.outcome, "problem": str(unusable)}
        if len(samples) > extractor.n_samples:
            seconds, context = len(samples) / extractor.sampling_rate, context_seconds(extractor)
            name = self.reader.name(example, index)
            row["problem"] = f"{name}: {seconds:.1f} s of audio, longer than the context of {context:g} s"
            if self.long_audio == "drop":
                return {**row, "outcome": "too_long"}
            row["outcome"] = CUT
            samples = samples[: extractor.n_samples]
        return row | example_features(samples, labels, self.processor, self.teacher_columns)

    def _empty_row(self, example: dict[str, Any], index: int) -> dict[str, Any]:
        extractor = self.processor.feature_extractor
        row = {
            "input_features": _no_features(extractor),
            "attention_mask": np.zeros(extractor.nb_max_frames, dtype=np.int8),
            "labels": [],
            "text": example[self.reader.text_column],
            "language": None,
            "index": index,
            "outcome": KEPT,
            "problem": "",
        }
        if self.teacher_columns is not None and self.teacher_columns.extractor is not None:
            row["teacher_input_features"] = _no_features(self.teacher_columns.extractor)
        if self.teacher_columns is not None and self.teacher_columns.vocabulary is not None:
            row["teacher_labels"] = []
        return row


def _no_features(extractor: Any) -> np.ndarray:
    return np.zeros((extractor.feature_size, extractor.nb_max_frames), dtype=np.float32)


def _usable_rows(
    prepared: datasets.Dataset, named: set[int], max_dropped: float
) -> tuple[datasets.Dataset, dict[str, int]]:
    """The rows that are kept, and the counts of outcomes. Warns of each dropped or cut item not yet `named`."""
    rows = prepared.select_columns(["outcome", "problem"])
    outcomes, problems = rows["outcome"][:], rows["problem"][:]
    for index, (outcome, problem) in enumerate(zip(outcomes, problems, strict=True)):
        if problem and index not in named:
            logger.warning("%s: %s", "cut" if outcome == CUT else "dropped", problem)
    counts = count_outcomes(outcomes)
    is_kept = [outcome in (KEPT, CUT) for outcome in outcomes]
    dropped = [problem for problem, kept in zip(problems, is_kept, strict=True) if not kept]
    check_dropped(counts, len(prepared), dropped, max_dropped, _REMEDY)
    prepared = prepared.remove_columns(["outcome", "problem"])
    if dropped:
        prepared = prepared.select([index for index, kept in enumerate(is_kept) if kept])
    return prepared.with_format("torch"), counts
