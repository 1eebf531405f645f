"""Recordings of a training run: their context, features and labels."""

from __future__ import annotations

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
    without_decoding,
)
from ..data.tables import load_recordings
from ..data.windows import MIN_GAP
from ..evaluation.error_rates import check_scorable
from ..languages.tags import prompt_code
from ..whisper import context_seconds
from .train_options import DataArguments, TrainOptions

if TYPE_CHECKING:
    from ..distillation.arguments import DistillationTrainingArguments


def load_split(data: DataArguments, language: str, dataset_config: str | None, split: str) -> datasets.Dataset:
    """
    Load the recordings and transcripts of one language.

    Args:
        data (`DataArguments`): Says where they are.
        language (`str`): The code.
        dataset_config (`str`, *optional*): The configuration on the Hub, or the subfolder.
        split (`str`): "train" or "eval": `data.train_split` or `data.eval_split`.

    Raises:
        ValueError: there is no such dataset or split, no row of the language, or no transcript to measure with.
    """
    dataset = data.dataset if split == "train" else data.eval_dataset or data.dataset
    recordings = load_recordings(
        dataset.replace("{language}", language),
        language,
        data.train_split if split == "train" else data.eval_split,
        config=dataset_config,
        revision=data.dataset_revision,
        audio_column=data.audio_column,
        text_column=data.text_column,
        file_column=data.file_column,
        languages=data.languages,
        limit=data.max_train_samples if split == "train" else data.max_eval_samples,
    )
    if split == "eval" and data.text_column in recordings.column_names:  # else prepare_dataset() says what is wrong
        check_scorable(recordings[data.text_column], language)
    return recordings


def dataset_configs(data: DataArguments, spellings: dict[str, str]) -> list[str | None]:
    """
    The dataset's configuration for each language.

    Args:
        data (`DataArguments`): With the languages as codes.
        spellings (`dict[str, str]`): Code to language as the user wrote it, which replaces "{language}".

    Raises:
        ValueError: the numbers of configurations and languages do not fit.
    """
    configs = _one_each("--dataset_config", data.dataset_config, data.languages)
    return [
        config and config.replace("{language}", spellings[language])
        for config, language in zip(configs, data.languages, strict=True)
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


def check_recordings(options: TrainOptions, languages: list[str], configs: list[str | None]) -> None:
    """
    Check headers and transcripts of all languages before any training, and say how many recordings can be used.

    Args:
        options (`TrainOptions`): Say where the recordings are.
        languages (`list[str]`): Codes of the languages to train.
        configs (`list[str]`): The dataset's configuration for each.

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
    if unused and not is_packed and languages:
        report(options.training, f"recordings are not packed, so {', '.join(unused)} change nothing")
    if data.pack and not is_packed and languages:
        report(options.training, f"context: {data.max_audio_seconds} s; recordings are not packed")
    for language, config in zip(languages, configs, strict=True):
        for split, name in (("train", "training"), ("eval", "evaluation")):
            context: float = cut_context(data, processor) or context_seconds(processor.feature_extractor)
            if is_packed and split == "train":
                context -= MIN_GAP
            with options.training.main_process_first(desc="recordings"):
                recordings = without_decoding(load_split(data, language, config, split), data.audio_column)
                reader = row_reader(recordings, processor, language, data, split)
                checks = check_rows(recordings, reader, data.preprocessing_workers, f"{language}: checking, {name}")
            outcomes, problems = outcomes_at_context(checks, context if data.long_audio == "drop" else None)
            counts = count_outcomes(outcomes)
            report(
                options.training,
                f"{language}, {name}: {counts[KEPT]} of {len(checks)} recordings can be used "
                f"({describe_dropped(counts)})",
            )
            check_dropped(
                counts, len(checks), list(filter(None, problems)), max_dropped(data, split), "give --allow_dropped"
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
        no_speech=split == "train" and data.no_speech > 0,
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
