"""Training batches of several languages: which adapters are trained, and the batches of a dataset."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from peft import PeftModel
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from ..data.sampler import LanguageBatchIterable
from ..languages import adapter_of_language


class EndlessBatches(IterableDataset):
    """
    Repeats batches without a length, epoch after epoch.

    Trainer treats such data as one epoch of all steps. A resumed run skips as many batches, through the same epochs.
    """

    def __init__(self, batches: LanguageBatchIterable) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        for epoch in count():
            self.batches.set_epoch(epoch)
            yield from self.batches


def dataset_column(dataset: Any, name: str) -> list[Any] | None:
    """A column of a dataset, or `None` if there is no such column."""
    if hasattr(dataset, "column_names"):
        return list(dataset.with_format(None)[name]) if name in dataset.column_names else None
    return [row[name] for row in dataset] if name in dataset[0] else None


def adapters_of_dataset(model: PeftModel, dataset: Any, language_column: str) -> list[str]:
    """
    The adapters of the languages in a training dataset. Empty if only the active adapter is trained.

    Raises:
        ValueError: the dataset is empty, has no languages while the model has several adapters, or has a language
            without an adapter; several adapters with `modules_to_save`.
    """
    adapters = model.peft_config
    if dataset is None:
        return []
    if not has_length(dataset):
        names = list(adapters) if len(adapters) > 1 else []  # the stream may have any of them
    elif len(dataset) == 0:
        raise ValueError("the training dataset is empty: check the split, and what was dropped in preparing it")
    else:
        languages = dataset_column(dataset, language_column)
        if languages is None and len(adapters) > 1:
            raise ValueError(
                f"the training dataset has no column {language_column!r}, which tells which of the adapters "
                f"{', '.join(adapters)} each example is for: add it, or name it in language_column"
            )
        names = [adapter_of_language(adapters, language) for language in dict.fromkeys(languages or [])]
    names = list(dict.fromkeys(names))
    if len(names) > 1 and any(adapters[name].modules_to_save for name in names):
        raise ValueError(
            f"modules_to_save follow the active adapter, not the language of a batch: train {', '.join(names)} one "
            "after the other, or without modules_to_save"
        )
    return names
