"""
Error rates of the second round, with intervals that cover trainings and utterances together.

A hierarchical bootstrap: a draw takes as many folds as there are, with replacement, and then utterances within each
drawn fold, with replacement. A fold stands for a training, its recordings and its test. Out of domain all folds hear
the same utterances, so a draw takes utterances once, for all folds. All methods share the draws, so their differences
are paired. Languages are drawn independently, and a mean over languages is the mean of their draws.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.comparison.errors import CHARACTERS, WORDS
from benchmarks.comparison.errors import RATES as UNBOUNDED_RATES
from benchmarks.comparison.estimates import DRAWS
from benchmarks.comparison.speech import OUT_OF_DOMAIN

# Fold to the counts of its utterances, integers [utterances, 7]: those of `errors`, and word errors up to all words.
Counts = Mapping[int, np.ndarray]
BOUNDED_ERRORS = 6
# In a bounded WER, an utterance in which a model repeats itself counts as wholly wrong, and no more.
RATES = UNBOUNDED_RATES | {"bounded": ((BOUNDED_ERRORS,), WORDS)}


@functools.lru_cache(maxsize=64)
def resamples(language: str, split: str, sizes: tuple[int, ...]) -> list[np.ndarray]:
    """
    How often each utterance is in each draw.

    Args:
        language (`str`), split (`str`): Decide the random numbers; the folds drawn are the same for all splits.
        sizes (`tuple[int, ...]`): Utterances of each fold.

    Returns:
        `list[np.ndarray]`: for each fold integers [1 + draws, utterances]. The first row is the data itself.
    """
    number = len(sizes)
    drawn = np.random.default_rng([number, *language.encode()]).integers(number, size=(DRAWS, number))
    generator = np.random.default_rng([*sizes, *f"{language} {split}".encode()])
    if split == OUT_OF_DOMAIN:
        utterances = _multinomial(generator, sizes[0], DRAWS)
        parts = [utterances * (drawn == fold).sum(axis=1, keepdims=True) for fold in range(number)]
    else:
        parts = [np.zeros((DRAWS, size), dtype=np.int64) for size in sizes]
        for place in range(number):
            for fold, size in enumerate(sizes):
                here = drawn[:, place] == fold
                parts[fold][here] += _multinomial(generator, size, int(here.sum()))
    return [
        np.concatenate([np.ones((1, size), dtype=np.int64), part]) for size, part in zip(sizes, parts, strict=True)
    ]


def _multinomial(generator: np.random.Generator, size: int, draws: int) -> np.ndarray:
    return generator.multinomial(size, np.full(size, 1 / size), size=draws)


def rate(counts: Counts, language: str, split: str, name: str) -> np.ndarray:
    """
    The error rate of a method in a language: errors and units are pooled over utterances and folds.

    Args:
        counts (`Counts`): The utterances of each fold.
        language (`str`), split (`str`): See `resamples`.
        name (`str`): "wer", "bounded" (WER) or "cer".

    Returns:
        `np.ndarray`: fractions [1 + draws], that of the data first.
    """
    errors, units = RATES[name]
    sums = totals(counts, language, split)
    return sums[:, errors].sum(axis=-1) / sums[:, units]


def totals(counts: Counts, language: str, split: str) -> np.ndarray:
    """The sums of the counts over utterances and folds [1 + draws, columns], that of the data first."""
    folds = sorted(counts)
    weights = resamples(language, split, tuple(len(counts[fold]) for fold in folds))
    return sum(weight @ counts[fold] for weight, fold in zip(weights, folds, strict=True))


def shared(counts: Counts, reference: Counts) -> tuple[Counts, Counts]:
    """Both, of the folds that both have."""
    folds = sorted(set(counts) & set(reference))
    return {fold: counts[fold] for fold in folds}, {fold: reference[fold] for fold in folds}


def difference(counts: Counts, reference: Counts, language: str, split: str, name: str) -> np.ndarray | None:
    """
    `rate` minus that of `reference`, over the folds that both have. `None` if there is none.

    Raises:
        ValueError: they were measured on different utterances.
    """
    counts, reference = shared(counts, reference)
    if not counts:
        return None
    for fold in counts:
        ours, theirs = counts[fold][:, [WORDS, CHARACTERS]], reference[fold][:, [WORDS, CHARACTERS]]
        if not np.array_equal(ours, theirs):
            raise ValueError(
                f"two methods were not measured on the same utterances of {language}, fold {fold}, {split!r} "
                f"({len(ours)} and {len(theirs)} of them): run one of them again"
            )
    return rate(counts, language, split, name) - rate(reference, language, split, name)


def counts_of(evaluation: Mapping[str, Any]) -> np.ndarray:
    """The counts of an evaluation's utterances; see `Counts`."""
    counts = np.asarray(evaluation["utterances"], dtype=np.int64)
    errors, _ = RATES["wer"]
    bounded = np.minimum(counts[:, errors].sum(axis=1), counts[:, WORDS])
    return np.column_stack([counts, bounded])
