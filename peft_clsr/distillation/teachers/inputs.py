"""The teacher's inputs in a prepared dataset: batches, hashes and checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ...extras import require

if TYPE_CHECKING:
    import datasets

_COLUMNS = ("input_features", "labels")


class TeacherBatch(NamedTuple):
    """Rows of a dataset: the teacher's inputs, and a hash of each row's."""

    rows: range
    features: list[torch.Tensor]  # float32 [mels, frames]
    labels: list[torch.Tensor]  # int64 [tokens]
    hashes: list[str]


def teacher_batches(dataset: datasets.Dataset, rows: range, batch_size: int) -> Iterator[TeacherBatch]:
    """
    Batches of a prepared dataset, from the columns `teacher_input_features` and `teacher_labels` if they are there,
    and else from `input_features` and `labels`.
    """
    import xxhash  # installed with datasets

    names = [f"teacher_{name}" if f"teacher_{name}" in dataset.column_names else name for name in _COLUMNS]
    dataset = dataset.select_columns(names).with_format("torch")
    for start in range(0, len(rows), batch_size):
        batch_rows = rows[start : start + batch_size]
        examples = dataset[batch_rows.start : batch_rows.stop]
        features = [tensor.float().contiguous() for tensor in examples[names[0]]]
        labels = [tensor.long().contiguous() for tensor in examples[names[1]]]
        hashes = []
        for example in zip(features, labels, strict=True):
            digest = xxhash.xxh3_128()
            for tensor in example:
                digest.update(repr(tuple(tensor.shape)).encode())
                digest.update(tensor.numpy())
            hashes.append(digest.hexdigest())
        yield TeacherBatch(batch_rows, features, labels, hashes)


def input_hashes(dataset: datasets.Dataset, rows: range) -> list[str]:
    """The hash of the teacher's inputs in each row."""
    return [digest for batch in teacher_batches(dataset, rows, batch_size=32) for digest in batch.hashes]


def flatten_indices(dataset: datasets.Dataset) -> datasets.Dataset:
    """The dataset with its rows stored in their order, so that a column can be joined to it."""
    if dataset._indices is None:
        return dataset
    # Dataset.flatten_indices would hold 1,000 rows in memory: 1 GB and more.
    flat = dataset.with_format("arrow").map(
        batched=True, batch_size=32, writer_batch_size=32, features=dataset.features, desc="rows in their order"
    )
    flat.set_format(**dataset.format)
    return flat


def check_dataset(dataset: Any) -> None:
    """Raise a `TypeError` or `ValueError` if a dataset was not prepared."""
    datasets = require("datasets")
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(f"the dataset is a {type(dataset).__name__}, expected a datasets.Dataset (one split)")
    if len(dataset) == 0:
        raise ValueError("the dataset is empty: check its split and filters")
    missing = [name for name in _COLUMNS if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"the dataset has no column {missing[0]!r}; it has {', '.join(map(repr, dataset.column_names))}. Make "
            "features and labels with prepare_dataset first"
        )


def check_teacher(teacher: nn.Module, dataset: datasets.Dataset, processor: Any) -> None:
    """Raise a `ValueError` if the processor is not the teacher's, or the features have other mel bins."""
    mels, start = teacher.config.num_mel_bins, teacher.config.decoder_start_token_id
    extractor, tokenizer = processor.feature_extractor, processor.tokenizer
    processor_mels, processor_start = extractor.feature_size, tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    if (processor_mels, processor_start) != (mels, start):
        raise ValueError(
            f"the processor has {processor_mels} mel bins and the start token {processor_start}, the teacher {mels} "
            f"and {start}: pass the teacher's own processor"
        )
    features = next(teacher_batches(dataset, range(1), batch_size=1)).features[0]
    if len(features) != mels:
        raise ValueError(
            f"the dataset's features have {len(features)} mel bins, the teacher takes {mels}: "
            "prepare_dataset(..., teacher_processor=...) adds the teacher's"
        )
