"""Batches of one language, from datasets with a length and from streams."""

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
    Batches of one language each, in an order that spreads every language over the epoch.

    Give it to `DataLoader(dataset, batch_sampler=...)` and that to `accelerator.prepare`, which deals batch i to
    process i % `num_replicas`: the sampler is the same on every process and yields the batches of all. Their number is
    a multiple of `num_replicas`: the largest are split in two until it is. Only where nothing is left to split
    (`batch_size=1`), up to `num_replicas - 1` batches come a second time.

    The order depends on `seed` and the epoch alone. Set the epoch on the prepared `DataLoader`, as `Trainer` does; it
    is passed on to the sampler (accelerate 1.7 or newer), except through `accelerate.skip_first_batches` on several
    processes: to resume in the middle of an epoch there, set it on the sampler too.

    Args:
        languages (`Sequence[str]`): Language of each example of the dataset, in its order.
        batch_size (`int`): Examples a batch, of one process; a language's last batch may be smaller.
        temperature (`float`, *optional*, defaults to 1.0):
            Evens out languages, T >= 1. Of a language with n examples, where the largest has m, an epoch takes
            m · (n / m)^(1/T), rounded up: proportions as in Arivazhagan et al. (arXiv 1907.05019). 1 takes every
            example exactly once, `math.inf` as many of each language as of the largest. Every example comes at least
            once; each further round over a language has an order of its own.
        num_replicas (`int`, *optional*, defaults to 1): Number of processes.
        lengths (`Sequence[int]`, *optional*):
            Length of each example in any unit; batches then hold similar lengths, to save padding.
        shuffle (`bool`, *optional*, defaults to `True`):
            Whether to shuffle. If not, examples keep the dataset's order within their language, and the batches of
            languages are dealt in proportion.
        seed (`int`, *optional*, defaults to 0): Seed of the order.

    Raises:
        ValueError: an argument out of range, no examples or fewer than processes, an example without a language,
            `lengths` of another number than `languages`, or `lengths` without `shuffle`.

    Example:

    ```python
    >>> sampler = LanguageBatchSampler(["ca", "ca", "uk", "ca"], batch_size=2, shuffle=False)
    >>> list(sampler)
    [[0, 1], [2], [3]]
    ```
    """

    # The sizes of batches differ: accelerate takes their number as it is only if this is None.
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
        members: dict[str, list[int]] = {}
        for index, language in enumerate(languages):
            if language is None:
                raise ValueError(f"example {index} has no language: set it, or filter the example out")
            members.setdefault(language, []).append(index)
        self.examples_per_batch = batch_size
        self.num_replicas = num_replicas
        self.lengths = None if lengths is None else list(lengths)
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self._members = list(members.values())
        most = max(map(len, self._members))
        # Rounded to 6 places first, as 25 · (7 / 25) is a little more than 7.
        self._sizes = [math.ceil(round(most * (len(own) / most) ** (1 / temperature), 6)) for own in self._members]

    @property
    def sampler(self) -> LanguageBatchSampler:
        """Itself: of a batch sampler that it shards, accelerate sets the epoch of the attribute `sampler` only."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; without it every epoch has the same."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches an epoch, of all processes together; the same in every epoch."""
        batches = sum(math.ceil(size / self.examples_per_batch) for size in self._sizes)
        return math.ceil(batches / self.num_replicas) * self.num_replicas

    def __iter__(self) -> Iterator[list[int]]:
        # Not seed + epoch, which gives seed 1 the epochs of seed 0; torch's generator reads 32 bits.
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {self.epoch}").getrandbits(32))
        placed: list[tuple[float, list[int]]] = []
        for members, size in zip(self._members, self._sizes, strict=True):
            examples = self._draw(members, size, generator)
            step = self.examples_per_batch
            batches = [examples[start : start + step] for start in range(0, size, step)]
            places = torch.full((len(batches),), 0.5, dtype=torch.float64)
            if self.shuffle:
                batches = [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
                places = torch.rand(len(batches), generator=generator, dtype=torch.float64)
            # The epoch in as many equal stretches as the language has batches, one batch somewhere in each.
            places = (torch.arange(len(batches)) + places) / len(batches)
            placed += zip(places.tolist(), batches, strict=True)
        placed.sort(key=lambda place_and_batch: place_and_batch[0])
        yield from _split_evenly([batch for _, batch in placed], self.num_replicas)

    def _draw(self, members: list[int], size: int, generator: torch.Generator) -> list[int]:
        """`size` examples of a language: rounds over all of them, each in an order of its own."""
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
    Batches of one language each from a stream, the equivalent of [`LanguageBatchSampler`] where there is no length.

    Examples wait, by language, until there are `batch_size` of one, and whole batches until every process has one.
    Every process reads the same whole stream (no `split_dataset_by_node`) and takes batch i where i % `num_replicas`
    is its rank. At the end, what waits comes as smaller batches, the largest split in two until every process has as
    many; fewer examples than processes are dropped, with a warning.

    The order and the balance of languages are the stream's: `stream.shuffle(...)` and
    `datasets.interleave_datasets(streams, probabilities=...)`. Up to `num_replicas` batches and one of each language
    are in memory.

    Args:
        dataset (`Iterable[dict]`): A `datasets.IterableDataset`, or any iterable of examples, read anew each epoch.
        batch_size (`int`): Examples a batch, of one process.
        language_column (`str`, *optional*, defaults to `"language"`): Key of an example's language.
        num_replicas (`int`, *optional*, defaults to 1): Number of processes.
        rank (`int`, *optional*, defaults to 0): Index of this process, from 0.

    Raises:
        ValueError: an argument out of range; in iteration, an example without a language, no examples or fewer than
            processes, or a `DataLoader` with several workers, which would each read the whole stream.

    Example:

    ```python
    >>> processes, rank = accelerator.num_processes, accelerator.process_index
    >>> batches = LanguageBatchIterable(stream, 16, num_replicas=processes, rank=rank)
    >>> loader = DataLoader(batches, batch_size=None, collate_fn=collator, num_workers=1)
    >>> # Not accelerator.prepare, which would deal the batches out once more.
    >>> loader = prepare_data_loader(
    ...     loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    ... )
    ```
    """

    def __init__(
        self,
        dataset: Iterable[dict[str, Any]],
        batch_size: int,
        language_column: str = "language",
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
        """Pass the epoch on to the dataset, where it has epochs."""
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
            language = example.get(self.language_column)
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
    """Batches in a number that is a multiple of `num_replicas`, by splitting the largest; needs as many examples."""
    batches = list(batches)
    while len(batches) % num_replicas:
        # The last of the largest, as small batches are expected at the end.
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
