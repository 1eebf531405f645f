"""Batches of one language, from datasets and from streams."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset, Sampler, get_worker_info
from transformers.trainer_pt_utils import get_length_grouped_indices

logger = logging.getLogger(__name__)


class LanguageBatchSampler(Sampler[list[int]]):
    """
    Samples batches of one language each, and spreads every language over the epoch.

    Pass it to `DataLoader(dataset, batch_sampler=...)` and that to `accelerator.prepare`, which gives batch i to
    process i % `num_replicas`. The sampler is the same on every process and yields the batches of all. Their number is
    a multiple of `num_replicas`: the largest batches are split in two until it is. If nothing is left to split
    (`batch_size=1`), up to `num_replicas - 1` batches come a second time.

    The order depends only on `seed` and the epoch. Set the epoch on the prepared `DataLoader`, as `Trainer` does. It
    reaches the sampler (accelerate 1.7 or newer), except through `accelerate.skip_first_batches` on several processes:
    to resume in the middle of an epoch there, set it on the sampler, too.

    Args:
        languages (`Sequence[str]`): Language of each example of the dataset, in its order.
        batch_size (`int`): Examples a batch, of one process; a language's last batch may be smaller.
        temperature (`float`, *optional*, defaults to 1.0):
            Balances languages, T >= 1. If a language has n examples and the largest has m, an epoch takes
            m · (n / m)^(1/T) of its examples, rounded up: proportions as in Arivazhagan et al. (arXiv 1907.05019). 1
            takes every example exactly once, `math.inf` equally many of each language. Every example comes at least
            once. Each round over a language has another order.
        num_replicas (`int`, *optional*, defaults to 1): Number of processes.
        lengths (`Sequence[int]`, *optional*):
            Length of each example in any unit. Batches then hold similar lengths, to save padding.
        shuffle (`bool`, *optional*, defaults to `True`):
            Shuffle. Otherwise examples keep the dataset's order within their language, and the batches of languages
            alternate in proportion.
        seed (`int`, *optional*, defaults to 0): Seed of the order.

    Raises:
        ValueError: an argument out of range, fewer examples than processes, an example without a language, `lengths`
            and `languages` of different number, or `lengths` without `shuffle`.

    Example:

    ```python
    >>> sampler = LanguageBatchSampler(["ca", "ca", "uk", "ca"], batch_size=2, shuffle=False)
    >>> list(sampler)
    [[0, 1], [2], [3]]
    ```
    """

    # Batches differ in size. accelerate keeps their number only if this is None.
    batch_size = None

    def __init__(
        self,
        languages: Sequence[str],
        batch_size: int,
        *,
        temperature: float = 1.0,
        num_replicas: int = 1,
        lengths: Sequence[int] | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        _check_positive(batch_size=batch_size, num_replicas=num_replicas)
        _check_enough_examples(len(languages), num_replicas)
        if not temperature >= 1:  # NaN as well
            raise ValueError(
                f"temperature is {temperature}; expected at least 1 (1: as in the data, math.inf: languages alike)"
            )
        if lengths is not None and len(lengths) != len(languages):
            raise ValueError(f"there are {len(lengths)} lengths for {len(languages)} examples; expected one for each")
        if lengths is not None and not shuffle:
            raise ValueError("lengths change the order of examples, shuffle=False keeps it: leave one of them out")
        by_language: dict[str, list[int]] = {}
        for index, language in enumerate(languages):
            if language is None:
                raise ValueError(f"example {index} has no language: set it, or filter the example out")
            by_language.setdefault(language, []).append(index)
        self.examples_per_batch = batch_size
        self.num_replicas = num_replicas
        self.lengths = None if lengths is None else list(lengths)
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self._members = list(by_language.values())
        most = max(map(len, self._members))
        # Rounded to 6 places first, as 25 · (7 / 25) is a little more than 7.
        self._sizes = [
            math.ceil(round(most * (len(members) / most) ** (1 / temperature), 6)) for members in self._members
        ]

    @property
    def sampler(self) -> LanguageBatchSampler:
        """Itself. accelerate sets the epoch of a sharded batch sampler only on its attribute `sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the order of the next iteration. Without it every epoch has the same order."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of batches an epoch, of all processes together. It is the same in every epoch."""
        batches = sum(math.ceil(size / self.examples_per_batch) for size in self._sizes)
        return math.ceil(batches / self.num_replicas) * self.num_replicas

    def __iter__(self) -> Iterator[list[int]]:
        # With seed + epoch, seed 1 would repeat the epochs of seed 0. torch's generator reads 32 bits.
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {self.epoch}").getrandbits(32))
        positioned: list[tuple[float, list[int]]] = []
        for members, size in zip(self._members, self._sizes, strict=True):
            examples = self._draw(members, size, generator)
            step = self.examples_per_batch
            batches = [examples[start : start + step] for start in range(0, size, step)]
            positions = torch.full((len(batches),), 0.5, dtype=torch.float64)
            if self.shuffle:
                batches = [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
                positions = torch.rand(len(batches), generator=generator, dtype=torch.float64)
            # Divide the epoch into as many equal parts as the language has batches, with one batch somewhere in each.
            positions = (torch.arange(len(batches)) + positions) / len(batches)
            positioned += zip(positions.tolist(), batches, strict=True)
        positioned.sort(key=lambda position_and_batch: position_and_batch[0])
        yield from _split_evenly([batch for _, batch in positioned], self.num_replicas)

    def _draw(self, members: list[int], size: int, generator: torch.Generator) -> list[int]:
        """Draw `size` examples of a language, in rounds over all of them, each in another order."""
        examples: list[int] = []
        while len(examples) < size:
            chosen = members
            if self.shuffle:
                chosen = [members[index] for index in torch.randperm(len(members), generator=generator).tolist()]
            chosen = chosen[: size - len(examples)]
            if self.lengths is not None:
                lengths = [self.lengths[index] for index in chosen]
                order = get_length_grouped_indices(lengths, self.examples_per_batch, generator=generator)
                chosen = [chosen[index] for index in order]
            examples += chosen
        return examples


class LanguageBatchIterable(IterableDataset):
    """
    Yields batches of one language each from a stream: [`LanguageBatchSampler`] for datasets without a length.

    Examples are collected by language until there are `batch_size` of one, and full batches until every process has
    one. Every process reads the same whole stream (no `split_dataset_by_node`) and takes batch i if i % `num_replicas`
    is its rank. At the end, the remaining examples come as smaller batches; the largest are split in two until every
    process has equally many. Fewer examples than processes are dropped, with a warning.

    The stream decides the order and the balance of languages: `stream.shuffle(...)` and
    `datasets.interleave_datasets(streams, probabilities=...)`. Up to `num_replicas` batches, and one of each language,
    are in memory.

    Args:
        dataset (`Iterable[dict]`): A `datasets.IterableDataset` or any iterable of examples, read once an epoch.
        batch_size (`int`): Examples a batch, of one process.
        language_column (`str`, *optional*, defaults to `"language"`):
            Key of an example's language. With `None`, all examples count as one language.
        num_replicas (`int`, *optional*, defaults to 1): Number of processes.
        rank (`int`, *optional*, defaults to 0): Index of this process, from 0.

    Raises:
        ValueError: an argument out of range; in iteration, an example without a language, fewer examples than
            processes, or a `DataLoader` with several workers, which would each read the whole stream.

    Example:

    ```python
    >>> processes, rank = accelerator.num_processes, accelerator.process_index
    >>> batches = LanguageBatchIterable(stream, 16, num_replicas=processes, rank=rank)
    >>> loader = DataLoader(batches, batch_size=None, collate_fn=collator, num_workers=1)
    >>> # Not accelerator.prepare, which would distribute the batches a second time.
    >>> loader = prepare_data_loader(
    ...     loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    ... )
    ```
    """

    def __init__(
        self,
        dataset: Iterable[dict[str, Any]],
        batch_size: int,
        language_column: str | None = "language",
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        _check_positive(batch_size=batch_size, num_replicas=num_replicas)
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank is {rank}; expected 0 to {num_replicas - 1}, as num_replicas is {num_replicas}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.language_column = language_column
        self.num_replicas = num_replicas
        self.rank = rank

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the dataset, if it has `set_epoch`."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"the DataLoader has {worker.num_workers} workers, and each would read the whole stream: set "
                "num_workers (dataloader_num_workers) to 0 or 1"
            )
        waiting: dict[str, list[dict[str, Any]]] = {}
        whole: list[list[dict[str, Any]]] = []
        examples = 0
        for example in self.dataset:
            language = "all" if self.language_column is None else example.get(self.language_column)
            if language is None:
                raise ValueError(
                    f"example {examples} of the stream has no language in {self.language_column!r}; it has "
                    f"{', '.join(map(repr, example))}. Set language_column, or filter the example out"
                )
            examples += 1
            waiting.setdefault(language, []).append(example)
            if len(waiting[language]) == self.batch_size:
                whole.append(waiting.pop(language))
            if len(whole) == self.num_replicas:
                yield whole[self.rank]
                whole = []
        _check_enough_examples(examples, self.num_replicas)
        rest = whole + list(waiting.values())
        left = sum(map(len, rest))
        if left >= self.num_replicas:
            yield from _split_evenly(rest, self.num_replicas)[self.rank :: self.num_replicas]
        elif left and self.rank == 0:
            logger.warning(
                "dropped the last %d of %d examples of the stream, fewer than the %d processes",
                left,
                examples,
                self.num_replicas,
            )


def _split_evenly(batches: list[list[Any]], num_replicas: int) -> list[list[Any]]:
    """Split the largest batches until their number is a multiple of `num_replicas`. Needs as many examples."""
    batches = list(batches)
    while len(batches) % num_replicas:
        # Take the last of the largest, as small batches are expected at the end.
        largest = max(reversed(range(len(batches))), key=lambda index: len(batches[index]))
        batch = batches[largest]
        if len(batch) == 1:
            return batches + batches[: -len(batches) % num_replicas]
        middle = (len(batch) + 1) // 2
        batches[largest : largest + 1] = [batch[:middle], batch[middle:]]
    return batches


def _check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")


def _check_enough_examples(examples: int, num_replicas: int) -> None:
    if examples == 0:
        raise ValueError("the dataset is empty")
    if examples < num_replicas:
        raise ValueError(
            f"the dataset has {examples} examples, fewer than the {num_replicas} processes: start fewer processes"
        )
