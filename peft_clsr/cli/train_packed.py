"""The packed windows of a training run."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import datasets
from transformers import WhisperProcessor

from ..data.packing import PackedUtterances, pack_utterances
from ..data.rows import KEPT, UnusableRow, check_dropped, count_outcomes, without_decoding
from ..whisper import context_seconds
from .train_data import label_limit, max_dropped, prompt_of, report, row_reader
from .train_options import TrainOptions

if TYPE_CHECKING:
    from ..distillation.arguments import DistillationTrainingArguments

logger = logging.getLogger(__name__)


def pack_recordings(
    recordings: datasets.Dataset,
    processor: WhisperProcessor,
    language: str,
    options: TrainOptions,
    teacher_processor: WhisperProcessor | None = None,
) -> tuple[PackedUtterances, dict[str, int]]:
    """
    Windows to train on, with the counts of kept and dropped recordings printed.

    Each recording is read once before, so that a broken one is known now, and not in the middle of the training.

    Raises:
        ValueError: nothing can be used, or more than a tenth cannot, without `--allow_dropped`.
    """
    data, training = options.data, options.training
    with training.main_process_first(desc="recordings"):  # the other processes read what is cached
        usable, counts = _usable(recordings, processor, language, options)
    packed: Any = pack_utterances(
        usable,
        processor,
        language,
        prompt_language=prompt_of(data, language),
        max_seconds=context_seconds(processor.feature_extractor),
        timestamps=data.timestamps,
        seed=training.seed if training.data_seed is None else training.data_seed,
        single=data.single,
        previous_text=data.previous_text,
        no_speech=data.no_speech,
        audio_column=data.audio_column,
        text_column=data.text_column,
        teacher_processor=teacher_processor,
        max_label_length=label_limit(data),
    )
    kinds = ", ".join(f"{count} {key}" for key, count in counts.items() if count)
    report(
        training,
        f"{language}, training: {kinds}; {len(packed)} windows an epoch, of {packed.seconds / len(packed):.1f} s of "
        "speech on average",
    )
    return packed, counts


def pack_held_out(
    recordings: datasets.Dataset, processor: WhisperProcessor, language: str, options: TrainOptions
) -> PackedUtterances:
    """Full windows of held-out recordings that were read before."""
    data = options.data
    packed: Any = pack_utterances(
        recordings,
        processor,
        language,
        prompt_language=prompt_of(data, language),
        max_seconds=context_seconds(processor.feature_extractor),
        timestamps=0,
        single=0,
        previous_text=0,
        audio_column=data.audio_column,
        text_column=data.text_column,
        max_label_length=label_limit(data),
    )
    return packed


def _usable(
    recordings: datasets.Dataset, processor: WhisperProcessor, language: str, options: TrainOptions
) -> tuple[datasets.Dataset, dict[str, int]]:
    """The recordings that can be packed, and counts of all. Warns of each that is left out."""
    data, extractor = options.data, processor.feature_extractor
    recordings = without_decoding(recordings, data.audio_column)
    reader = row_reader(recordings, processor, language, data, "train")
    limit = context_seconds(extractor)

    def check(row: dict[str, Any], index: int) -> dict[str, str]:
        try:
            _, labels = reader.labels(row, index)
            if len(labels) >= reader.max_label_length:  # with timestamps there is one token more
                problem = f"{reader.name(row, index)}: labels of {len(labels)} tokens leave no room for timestamps"
                raise UnusableRow("labels_too_long", problem)
            seconds = len(reader.samples(row, index, extractor.sampling_rate)) / extractor.sampling_rate
            is_speech = bool((row[reader.text_column] or "").strip())
            if is_speech and seconds > limit:  # windows have parts of recordings without speech
                problem = f"{reader.name(row, index)}: {seconds:.1f} s of audio, longer than {limit:g} s"
                raise UnusableRow("too_long", problem)
        except UnusableRow as unusable:
            return {"outcome": unusable.outcome, "problem": str(unusable)}
        return {"outcome": KEPT, "problem": ""}

    checks = recordings.map(
        check,
        with_indices=True,
        remove_columns=recordings.column_names,
        num_proc=data.preprocessing_workers,
        desc=f"{language}: reading, training",
    )
    outcomes, problems = checks["outcome"][:], list(filter(None, checks["problem"]))
    for problem in problems:
        logger.warning("dropped: %s", problem)
    counts = count_outcomes(outcomes)
    check_dropped(counts, len(recordings), problems, max_dropped(data, "train"), "give --allow_dropped")
    return recordings.select([index for index, outcome in enumerate(outcomes) if outcome == KEPT]), counts


def planned_epochs(training: DistillationTrainingArguments, windows: int) -> int:
    """The number of epochs of a training on so many windows of one language, as Trainer counts them."""
    if training.max_steps <= 0:
        return math.ceil(training.num_train_epochs)
    batches = windows / (training.per_device_train_batch_size * training.world_size)
    whole = max(1, math.floor(batches) if training.dataloader_drop_last else math.ceil(batches))
    return math.ceil(training.max_steps / math.ceil(whole / training.gradient_accumulation_steps))
