"""The recordings of a training run: those to train on, those that choose the best checkpoint, and those for test."""

from __future__ import annotations

from typing import NamedTuple

import datasets

from ..data.rows import text_column_of
from ..data.segments import START_COLUMN
from ..data.split import MissingSplitError, split_by_text, split_segments
from ..data.tables import load_recordings
from ..data.votes import most_upvoted
from ..evaluation.error_rates import check_scorable
from ..sources import is_local_dataset
from .train_options import DataArguments


class Configs(NamedTuple):
    """Configurations on the Hub, or subfolders, of one language: of the dataset, and of that for test."""

    dataset: str | None
    test: str | None


class Splits(NamedTuple):
    """
    Recordings and transcripts of one language.

    `notes` say how the validation recordings were taken, and how many recordings have most votes.
    """

    train: datasets.Dataset
    validation: datasets.Dataset | None
    test: datasets.Dataset
    notes: list[str]


def load_splits(data: DataArguments, language: str, configs: Configs) -> Splits:
    """
    Load the recordings and transcripts of one language. They have the columns of `--dataset`.

    Args:
        data (`DataArguments`): Says where they are.
        language (`str`): The tag.
        configs ([`Configs`]): Its configurations.

    Raises:
        ValueError: there is no such dataset or split, no row of the language, or no transcript to measure with.
    """
    notes: list[str] = []
    train = _load(data, language, configs.dataset, data.train_split, data.max_train_samples)
    if data.most_upvoted is not None:
        total = len(train)
        train = most_upvoted(train, data.most_upvoted, f"{data.dataset}, {data.train_split}")
        notes.append(f"{len(train)} of {total} recordings taken, those with most up-votes")
    validation = None
    if data.validation_split is not None:
        try:
            validation = _load(data, language, configs.dataset, data.validation_split, data.max_eval_samples)
        except MissingSplitError as error:
            train, validation, note = held_out(train, data, error)
            notes.append(note)
        _check_scorable(validation, data, language)
    return Splits(train, validation, load_test(data, language, configs.test), notes)


def load_test(data: DataArguments, language: str, config: str | None) -> datasets.Dataset:
    """The recordings to measure on, with the columns of `--dataset`. Raises as [`load_splits`]."""
    name = data.eval_dataset or data.dataset
    text_column = data.eval_text_column or data.text_column
    audio_column = data.eval_audio_column or data.audio_column
    source = name.replace("{language}", language)
    recordings = load_recordings(
        source,
        language,
        data.eval_split,
        config=config,
        revision=data.eval_revision or (None if is_local_dataset(source) else data.dataset_revision),
        audio_column=audio_column,
        text_column=text_column,
        file_column=data.file_column,
        languages=data.languages,
        limit=data.max_eval_samples,
    )
    for option, column, ours in (
        ("--eval_text_column", text_column, data.text_column),
        ("--eval_audio_column", audio_column, data.audio_column),
    ):
        if column == ours:
            continue
        if column not in recordings.column_names:
            raise ValueError(
                f"{name}, {data.eval_split} has no column {column!r}, but {', '.join(recordings.column_names)}: set "
                f"{option} to one of them"
            )
        if ours in recordings.column_names:
            recordings = recordings.remove_columns(ours)
        recordings = recordings.rename_column(column, ours)
    _check_scorable(recordings, data, language)
    return recordings


def _load(data: DataArguments, language: str, config: str | None, split: str, limit: int | None) -> datasets.Dataset:
    return load_recordings(
        data.dataset.replace("{language}", language),
        language,
        split,
        config=config,
        revision=data.dataset_revision,
        audio_column=data.audio_column,
        text_column=data.text_column,
        file_column=data.file_column,
        languages=data.languages,
        limit=limit,
    )


def held_out(
    train: datasets.Dataset, data: DataArguments, missing: MissingSplitError
) -> tuple[datasets.Dataset, datasets.Dataset, str]:
    """Take a tenth of the training recordings for validation. Returns what is left, the tenth, and a note."""
    column = text_column_of(train.column_names, data.text_column)
    if column not in train.column_names:
        raise missing
    texts = [text or "" for text in train[column][:]]
    parts = (data.train_split, str(data.validation_split))
    how = "text, each sentence in one part"
    try:
        if START_COLUMN in train.column_names:
            places = [str(recording) for recording in train[data.audio_column][:]]
            part_of, how = split_segments(places, train[START_COLUMN][:], texts, parts)
        else:
            part_of = split_by_text(texts, parts)
    except ValueError as error:
        raise ValueError(f"{missing}; and of the training recordings none can be held out: {error}") from error
    kept, taken = ([row for row, part in enumerate(part_of) if part == name] for name in parts)
    note = (
        f"no split {data.validation_split!r} ({missing}), so {len(taken)} of {len(train)} training recordings are "
        f"held out for validation, by {how}"
    )
    return train.select(kept), train.select(taken), note


def _check_scorable(recordings: datasets.Dataset, data: DataArguments, language: str) -> None:
    column = text_column_of(recordings.column_names, data.text_column)
    if column in recordings.column_names:  # else prepare_dataset() says what is wrong
        check_scorable(recordings[column], language)
