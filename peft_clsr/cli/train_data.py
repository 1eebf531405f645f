"""Recordings of a training run: their context, features and labels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import datasets
from transformers import WhisperFeatureExtractor, WhisperProcessor

from ..data.audio import audio_seconds
from ..data.dataset import prepare_dataset, without_decoding
from ..data.tables import load_recordings
from ..evaluation.error_rates import check_scorable
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
    recordings = load_recordings(
        data.dataset.replace("{language}", language),
        language,
        data.train_split if split == "train" else data.eval_split,
        config=dataset_config,
        revision=data.dataset_revision,
        audio_column=data.audio_column,
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
    configs: list[str | None] = [None] if data.dataset_config is None else [*data.dataset_config]
    if len(configs) == 1:
        configs = configs * len(data.languages)
    if len(configs) != len(data.languages):
        raise ValueError(
            f"{len(configs)} values of --dataset_config for {len(data.languages)} languages: give one each, in "
            "their order, or one for all"
        )
    return [
        config and config.replace("{language}", spellings[language])
        for config, language in zip(configs, data.languages, strict=True)
    ]


def choose_context(options: TrainOptions, configs: list[str | None]) -> int:
    """
    The shortest context, in whole seconds, that holds all usable recordings of all languages, at most the student's.

    All languages get one context, as adapters on one model share it. With long_audio="cut" no recording is too long.
    """
    data = options.data
    longest, whole = 0.0, WhisperFeatureExtractor.from_pretrained(data.student).chunk_length
    for language, config in zip(data.languages, configs, strict=True):
        for split in ("train", "eval"):
            for seconds in _durations(load_split(data, language, config, split), data):
                if data.long_audio == "cut" or seconds <= whole:
                    longest = max(longest, seconds)
    context = min(math.ceil(longest), whole) or whole
    report(
        options.training,
        f"context: {context} s, for the longest usable recording of {longest:.1f} s "
        f"(--max_audio_seconds sets another, 0 the model's own {whole} s)",
    )
    return context


def _durations(recordings: datasets.Dataset, data: DataArguments) -> list[float]:
    """Lengths, in seconds, of the recordings with text. Unreadable ones are left out; only headers are read."""
    if not {data.audio_column, data.text_column} <= set(recordings.column_names):
        return []  # prepare_dataset() says what is wrong
    rows = without_decoding(recordings.select_columns([data.audio_column, data.text_column]), data.audio_column)
    durations = [audio_seconds(row[data.audio_column]) for row in rows if (row[data.text_column] or "").strip()]
    return [seconds for seconds in durations if seconds is not None]


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
            teacher_processor=teacher_processor,
            audio_column=data.audio_column,
            text_column=data.text_column,
            long_audio=data.long_audio,
            num_proc=data.preprocessing_workers,
            desc=f"{language}: features, {name}",
        )
    report(training, f"{language}, {name}: " + ", ".join(f"{count} {key}" for key, count in counts.items() if count))
    return prepared, counts


def report(training: DistillationTrainingArguments, text: str) -> None:
    """Print on one process only."""
    if training.process_index == 0:
        print(text, flush=True)
