"""Recordings of a training run: their context, features and labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import datasets
from transformers import AutoConfig, WhisperProcessor

from ..data.dataset import prepare_dataset
from ..data.labels import MAX_LABEL_LENGTH
from ..data.rows import (
    KEPT,
    RowReader,
    check_dropped,
    check_rows,
    count_outcomes,
    describe_dropped,
    outcomes_at_context,
    text_column_of,
    without_decoding,
)
from ..evaluation.normalization import leading_rate
from ..languages.tags import prompt_code
from ..whisper import context_seconds
from .train_options import DataArguments, TrainOptions
from .train_splits import Configs, load_splits

if TYPE_CHECKING:
    from ..distillation.arguments import DistillationTrainingArguments


def language_configs(data: DataArguments, spellings: dict[str, str]) -> list[Configs]:
    """
    The configurations of each language.

    Args:
        data (`DataArguments`): With the languages as codes.
        spellings (`dict[str, str]`): Code to language as the user wrote it, which replaces "{language}".

    Raises:
        ValueError: the numbers of configurations and languages do not fit.
    """
    of_dataset = _one_each("--dataset_config", data.dataset_config, data.languages)
    of_test = _one_each("--eval_config", data.eval_config or data.dataset_config, data.languages)
    return [
        Configs(*(config and config.replace("{language}", spellings[language]) for config in configs))
        for *configs, language in zip(of_dataset, of_test, data.languages, strict=True)
    ]


def _one_each(option: str, values: list[str] | None, languages: list[str]) -> list[str | None]:
    """The value of an option for each language: its own, the only one, or `None`."""
    given: list[str | None] = [None] if values is None else [*values]
    if len(given) == 1:
        given = given * len(languages)
    if len(given) != len(languages):
        raise ValueError(
            f"{len(given)} values of {option} for {len(languages)} languages: give one each, in their order, or one "
            "for all"
        )
    return given


def prompt_codes(data: DataArguments) -> list[str]:
    """
    Whisper's codes of the languages in the prompts, in the order of `data.languages`.

    `data.prompt_language` is set to them, if it was given.

    Raises:
        ValueError: the numbers of prompt languages and languages do not fit, or a language needs one.
    """
    given = _one_each("--prompt_language", data.prompt_language, data.languages)
    codes = [prompt_code(language, prompt) for language, prompt in zip(data.languages, given, strict=True)]
    if data.prompt_language is not None:
        data.prompt_language = codes
    return codes


def prompt_of(data: DataArguments, language: str) -> str:
    """Whisper's code of the language in the prompt of one of `data.languages`."""
    if data.prompt_language is None:
        return prompt_code(language)
    return data.prompt_language[data.languages.index(language)]


# The share of training recordings that may be dropped without --allow_dropped.
MAX_DROPPED = 0.1


def check_recordings(options: TrainOptions, languages: list[str], configs: list[Configs]) -> None:
    """
    Check headers and transcripts of all languages before any training, and say how many recordings can be used.

    Args:
        options (`TrainOptions`): Say where the recordings are.
        languages (`list[str]`): Codes of the languages to train.
        configs (`list[Configs]`): The configurations of each.

    Raises:
        ValueError: nothing can be used, or more than a tenth of a language's training data cannot, without
            `--allow_dropped`; `--long_audio cut` with packing.
    """
    data = options.data
    processor = WhisperProcessor.from_pretrained(data.student)
    is_packed = packs(data, processor)
    if is_packed and data.long_audio == "cut":
        raise ValueError(
            "--long_audio cut keeps the beginning of a long recording, and whole recordings are packed: leave it out, "
            "or give --pack False"
        )
    packing = ("timestamps", "single", "previous_text", "no_speech")
    unused = [f"--{name}" for name in packing if getattr(data, name) != getattr(DataArguments, name)]
    if not is_packed and languages:
        report_unused(options.training, "recordings are not packed", unused)
    if data.pack and not is_packed and languages:
        report(options.training, f"context: {data.max_audio_seconds} s; recordings are not packed")
    for language, config in zip(languages, configs, strict=True):
        with options.training.main_process_first(desc="recordings"):
            splits = load_splits(data, language, config)
        for note in splits.notes:
            report(options.training, f"{language}: {note}")
        if splits.validation is not None:
            column = text_column_of(splits.validation.column_names, data.text_column)
            if column in splits.validation.column_names:
                _report_size(splits.validation[column], language, options.training)
        for split, name, loaded in (
            ("train", "training", splits.train),
            ("validation", "validation", splits.validation),
            ("eval", "evaluation", splits.test),
        ):
            if loaded is None:
                continue
            context: float = cut_context(data, processor) or context_seconds(processor.feature_extractor)
            with options.training.main_process_first(desc="recordings"):
                recordings = without_decoding(loaded, data.audio_column)
                reader = row_reader(recordings, processor, language, data, split)
                checks = check_rows(recordings, reader, data.preprocessing_workers, f"{language}: checking, {name}")
            limit = context if data.long_audio == "drop" else None
            outcomes, problems = outcomes_at_context(
                checks, limit, _without_text(recordings, reader) if is_packed and split == "train" else ()
            )
            counts, found = count_outcomes(outcomes), list(filter(None, problems))
            report(
                options.training,
                f"{language}, {name}: {counts[KEPT]} of {len(checks)} recordings can be used "
                f"({'; '.join([describe_dropped(counts), *found[:_SHOWN]])}{'; ...' if len(found) > _SHOWN else ''})",
            )
            check_dropped(counts, len(checks), found, max_dropped(data, split), "give --allow_dropped")


def _without_text(recordings: datasets.Dataset, reader: RowReader) -> set[int]:
    """The rows without text. If they are packed, windows have parts of them."""
    texts = recordings[reader.text_column]
    return {index for index, text in enumerate(texts) if not (text or "").strip()}


_SHOWN = 3  # recordings named that cannot be used
# Below this many words, a standard error of WER is 3 points and more.
MIN_WORDS = 200


def _report_size(texts: Iterable[str | None], language: str, training: DistillationTrainingArguments) -> None:
    """Say that few validation recordings tell checkpoints apart by chance."""
    words = sum(len((text or "").split()) for text in texts)
    metric = str(training.metric_for_best_model)
    if words < MIN_WORDS and not metric.endswith("loss") and leading_rate(language) == "wer":
        report(
            training,
            f"{language}: the validation recordings have {words} words, so differences of a few points between "
            "checkpoints are chance (--metric_for_best_model loss chooses by the loss instead)",
        )


def cut_context(data: DataArguments, processor: WhisperProcessor) -> int | None:
    """The seconds to which the context is cut; `None` if it stays as it is."""
    whole = processor.feature_extractor.chunk_length
    return None if data.max_audio_seconds in (None, whole) else data.max_audio_seconds


def packs(data: DataArguments, processor: WhisperProcessor) -> bool:
    """True if recordings are packed to windows of the context, which is then whole."""
    return data.pack and cut_context(data, processor) is None


def max_dropped(data: DataArguments, split: str) -> float:
    """The share of a split's recordings that may be dropped. Dropped evaluation recordings are only reported."""
    return 1.0 if data.allow_dropped or split != "train" else MAX_DROPPED


def row_reader(
    recordings: datasets.Dataset, processor: WhisperProcessor, language: str, data: DataArguments, split: str
) -> RowReader:
    """The reader of the undecoded recordings of a split. Raises a `ValueError` for missing columns."""
    return RowReader.of(
        recordings,
        tokenizer=processor.tokenizer,
        language=language,
        prompt_language=prompt_of(data, language),
        task="transcribe",
        audio_column=data.audio_column,
        text_column=data.text_column,
        language_column="language",
        no_speech=split == "train" and data.no_speech > 0 and packs(data, processor),
        max_label_length=label_limit(data),
    )


def label_limit(data: DataArguments) -> int:
    """The longest labels, in tokens, that student and teacher take."""
    models = [model for model in (data.student, data.teacher) if model is not None]
    return min(
        getattr(AutoConfig.from_pretrained(model), "max_target_positions", MAX_LABEL_LENGTH) for model in models
    )


def prepare(
    recordings: datasets.Dataset,
    processor: WhisperProcessor,
    language: str,
    name: str,
    options: TrainOptions,
    teacher_processor: WhisperProcessor | None = None,
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Features and labels by `prepare_dataset`, with the counts of kept and dropped recordings printed."""
    data, training = options.data, options.training
    with training.main_process_first(desc="features"):  # the other processes read them from the disk
        prepared, counts = prepare_dataset(
            recordings,
            processor,
            language,
            prompt_language=prompt_of(data, language),
            teacher_processor=teacher_processor,
            audio_column=data.audio_column,
            text_column=data.text_column,
            long_audio=data.long_audio,
            max_label_length=label_limit(data),
            max_dropped=max_dropped(data, "train" if name == "training" else "eval"),
            num_proc=data.preprocessing_workers,
            desc=f"{language}: features, {name}",
        )
    report(training, f"{language}, {name}: " + ", ".join(f"{count} {key}" for key, count in counts.items() if count))
    return prepared, counts


def report(training: DistillationTrainingArguments, text: str) -> None:
    """Print on one process only."""
    if training.process_index == 0:
        print(text, flush=True)


def report_unused(training: DistillationTrainingArguments, reason: str, options: list[str]) -> None:
    """Say which options change nothing, if there are any."""
    if options:
        report(training, f"{reason}, so {', '.join(options)} {'changes' if len(options) == 1 else 'change'} nothing")
