"""Training batches: of one language each, or of similar lengths. And which adapters a dataset trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from peft import PeftModel
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import has_length

from ..data.packing import PackedUtterances
from ..data.sampler import LanguageBatchIterable, LanguageBatchSampler
from ..languages.adapters import adapter_of_language
from ..tuner.broader import warn_of_broader_adapters
from .arguments import DistillationTrainingArguments
from .teachers.windows import WindowsWithStates


def trained_adapters(model: PeftModel, dataset: Any, language_column: str) -> list[str]:
    """
    The adapters of the languages in a training dataset; empty if it trains the active adapter.

    Raises:
        ValueError: the dataset is empty, lacks the language column, or has a language without an adapter; several
            adapters are trained and have `modules_to_save`.
    """
    adapters = model.peft_config
    if dataset is None:
        return []
    if not has_length(dataset):
        names = list(adapters) if len(adapters) > 1 else []  # a stream may have any of them
    elif len(dataset) == 0:
        raise ValueError("the training dataset is empty: check the split, and how many examples preparation dropped")
    else:
        languages = dataset_column(dataset, language_column)
        if languages is None and len(adapters) > 1:
            raise ValueError(
                f"the training dataset has no column {language_column!r}, which tells which of the adapters "
                f"{', '.join(adapters)} each example is for: add it, or name it in language_column"
            )
        taken = {language: adapter_of_language(adapters, language) for language in dict.fromkeys(languages or [])}
        warn_of_broader_adapters(model.base_model.routing, adapters, taken)
        names = list(taken.values())
    names = list(dict.fromkeys(names))
    if len(names) > 1 and any(adapters[name].modules_to_save for name in names):
        raise ValueError(
            f"modules_to_save follow the active adapter, not the language of a batch: train {', '.join(names)} one "
            "after the other, or without modules_to_save"
        )
    return names


def batch_sampler(dataset: Any, args: DistillationTrainingArguments, batch_size: int) -> LanguageBatchSampler:
    """
    Sampler of a dataset with a length. Without a language column, all examples count as one language.

    Raises:
        ValueError: `args` group by length, and the dataset has no lengths.
    """
    return LanguageBatchSampler(
        dataset_column(dataset, args.language_column) or ["all"] * len(dataset),
        batch_size,
        temperature=args.language_temperature,
        num_replicas=args.world_size,
        lengths=_lengths(dataset, args) if args.train_sampling_strategy == "group_by_length" else None,
        shuffle=args.train_sampling_strategy != "sequential",
        seed=args.seed if args.data_seed is None else args.data_seed,
    )


def warn_of_unused_temperature(args: DistillationTrainingArguments, where: str) -> None:
    """Warn if a `language_temperature` is set that does not change the batches."""
    if args.language_temperature != 1:
        warnings.warn(
            f"language_temperature is {args.language_temperature}, and has no effect on {where}", stacklevel=3
        )


def stream_loader(
    stream: Any,
    args: DistillationTrainingArguments,
    batch_size: int,
    collator: Callable[..., Any],
    has_languages: bool,
) -> DataLoader:
    """
    Loader of a dataset without a length: this process's batches, epoch after epoch, without end. If it trains several
    languages, each batch has one.
    """
    column = args.language_column if has_languages else None
    batches = LanguageBatchIterable(stream, batch_size, column, args.world_size, args.process_index)
    return DataLoader(
        _EndlessBatches(batches), batch_size=None, collate_fn=collator, num_workers=args.dataloader_num_workers
    )


class _EndlessBatches(IterableDataset):
    """
    Repeats a stream of batches, each time as a new epoch.

    Trainer sees a stream as one epoch of `max_steps`. A resumed run skips the batches it has trained on, whatever
    epoch of the stream they were in.
    """

    def __init__(self, batches: LanguageBatchIterable) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        for epoch in count():
            self.batches.set_epoch(epoch)
            yield from self.batches


def _lengths(dataset: Any, args: DistillationTrainingArguments) -> list[int]:
    """The column `length_column_name`, or else the number of labels: all features have the same length."""
    lengths, labels = dataset_column(dataset, args.length_column_name), dataset_column(dataset, "labels")
    if lengths is None and labels is None:
        raise ValueError(
            f"the dataset has neither {args.length_column_name!r} (length_column_name) nor 'labels' to group by "
            "length: prepare it with prepare_dataset, or add the column"
        )
    return [len(row) for row in labels] if lengths is None else lengths


def dataset_column(dataset: Any, name: str) -> list[Any] | None:
    """A column of a dataset; `None` if there is no such column."""
    if isinstance(dataset, (PackedUtterances, WindowsWithStates)):  # a row would be computed for its language
        return dataset.languages if name == "language" else None
    if hasattr(dataset, "column_names"):
        return list(dataset.with_format(None)[name]) if name in dataset.column_names else None
    return [row[name] for row in dataset] if name in dataset[0] else None
