"""The teacher's inputs in a prepared dataset: batches, marks and checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ...data.teacher_columns import STATES_COLUMN
from ...extras import require

if TYPE_CHECKING:
    import datasets

    from .windows import PlannedWindows

_COLUMNS = ("input_features", "labels")
_NO_TOKENS = torch.zeros(0, dtype=torch.long)
HASH_COLUMN = "fed"  # hash of the teacher's inputs, in each row of a shard


class TeacherBatch(NamedTuple):
    """Rows of a dataset: the teacher's inputs, and marks that tell whether they have changed."""

    rows: range
    features: list[torch.Tensor]  # float32 [mels, frames]
    labels: list[torch.Tensor]  # int64 [tokens]
    prompts: list[torch.Tensor]  # int64 [tokens], read before the labels
    marks: dict[str, list[Any]]  # columns of a shard


class PreparedRows:
    """
    Rows of a prepared dataset: the columns `teacher_input_features` and `teacher_labels` if they are there, and else
    `input_features` and `labels`. The mark of a row is a hash of its inputs.
    """

    marks = {HASH_COLUMN: "string"}
    settings: dict[str, Any] = {}

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, row: int) -> str:
        text = f" ({self.dataset['text'][row]!r})" if "text" in self.dataset.column_names else ""
        return f"example {row}{text}"

    def batches(self, rows: range, batch_size: int) -> Iterator[TeacherBatch]:
        names = [f"teacher_{name}" if f"teacher_{name}" in self.dataset.column_names else name for name in _COLUMNS]
        dataset = self.dataset.select_columns(names).with_format("torch")
        for start in range(0, len(rows), batch_size):
            batch_rows = rows[start : start + batch_size]
            examples = dataset[batch_rows.start : batch_rows.stop]
            features = [tensor.float().contiguous() for tensor in examples[names[0]]]
            labels = [tensor.long().contiguous() for tensor in examples[names[1]]]
            hashes = [hash_tensors(*example) for example in zip(features, labels, strict=True)]
            yield TeacherBatch(batch_rows, features, labels, [_NO_TOKENS] * len(labels), {HASH_COLUMN: hashes})

    def problem(
        self, rows: range, shard: datasets.Dataset, shards: Callable[[], list[datasets.Dataset]]
    ) -> str | None:
        """
        Say whether a shard is of other inputs than these rows.

        Args:
            rows (`range`): The rows that the shard is for.
            shard (`datasets.Dataset`): Marks and states.
            shards (`Callable`): Returns all shards that are there.
        """
        cached, expected = shard[HASH_COLUMN][:], self._hashes(rows)
        if cached == expected:
            return None
        row = next(row for row, *pair in zip(rows, cached, expected, strict=True) if pair[0] != pair[1])
        in_cache = {digest for other in shards() for digest in other[HASH_COLUMN]}
        is_reordered = in_cache.issubset(self._hashes(range(len(self))))
        what = "the dataset's examples in another order" if is_reordered else "other examples than the dataset's"
        return f"{what}, first at row {row}"

    def with_states(self, states: datasets.Dataset) -> datasets.Dataset:
        """The dataset with the column `teacher_states` of `states`."""
        states = states.select_columns(STATES_COLUMN)
        dataset = require("datasets").concatenate_datasets([self.dataset, states], axis=1, split=self.dataset.split)
        formatting = self.dataset.format
        dataset.set_format(**{**formatting, "columns": [*formatting["columns"], STATES_COLUMN]})
        return dataset

    def _hashes(self, rows: range) -> list[str]:
        return [digest for batch in self.batches(rows, batch_size=32) for digest in batch.marks[HASH_COLUMN]]


def hash_tensors(*tensors: torch.Tensor) -> str:
    """A hash (XXH3) of the shapes and contents of tensors: 32 hexadecimal digits."""
    import xxhash  # installed with datasets

    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.numpy())
    return digest.hexdigest()


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
        raise TypeError(
            f"the dataset is a {type(dataset).__name__}, expected a datasets.Dataset (one split), or what "
            "pack_utterances makes of one"
        )
    if len(dataset) == 0:
        raise ValueError("the dataset is empty: check its split and filters")
    missing = [name for name in _COLUMNS if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"the dataset has no column {missing[0]!r}; it has {', '.join(map(repr, dataset.column_names))}. Make "
            "features and labels with prepare_dataset first"
        )


def check_teacher(teacher: nn.Module, rows: PreparedRows | PlannedWindows, processor: Any) -> None:
    """Raise a `ValueError` if the processor is not the teacher's, or the features have other mel bins."""
    mels, start = teacher.config.num_mel_bins, teacher.config.decoder_start_token_id
    extractor, tokenizer = processor.feature_extractor, processor.tokenizer
    processor_mels, processor_start = extractor.feature_size, tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    if (processor_mels, processor_start) != (mels, start):
        raise ValueError(
            f"the processor has {processor_mels} mel bins and the start token {processor_start}, the teacher {mels} "
            f"and {start}: pass the teacher's own processor"
        )
    features = next(rows.batches(range(1), batch_size=1)).features[0]
    if len(features) != mels:
        raise ValueError(
            f"the dataset's features have {len(features)} mel bins, the teacher takes {mels}: "
            "prepare_dataset(..., teacher_processor=...), or pack_utterances, adds the teacher's"
        )
