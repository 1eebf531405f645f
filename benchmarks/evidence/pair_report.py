"""Tables of a change to a method and the method without it, over the folds that both have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.comparison.estimates import interval
from benchmarks.comparison.report import format_interval, percent, table

from .estimates import difference, rate, shared
from .grid import GROUPS, TAUGHT_EXPERTS
from .rows import BOTH, SPLITS, Row, language_name, mean

BOTH_DOMAINS, BOUNDED = "both domains", "both domains, bounded"
MEAN = "mean"
NAMES = ("base", "changed", "difference")


@dataclass(frozen=True)
class Pairs:
    """A table: the labels of changed methods, and those that they are compared with."""

    title: str
    text: str
    bases: Mapping[str, str]


HALVES = Pairs(
    "Half of what was trained",
    "WER in %, of all that was trained and of half of it (`peft_clsr.scale_expert`; the same of LoRA and of full "
    "fine-tuning), and the difference in points: below 0, half has fewer errors. It is over the folds that both "
    "have. Half is not tuned.",
    {method.label: method.label.removesuffix(", half") for method in GROUPS["half"]},
)
_FULL_HALF, _LORA_HALF, _EXPERT_HALF = (method.label for method in GROUPS["half"])
AMONG_HALVES = Pairs(
    "Halves to each other",
    "WER in %, of half of experts and of the halves of others, and the difference in points: above 0, half of experts "
    "has fewer errors. It is over the folds that both have.",
    {_FULL_HALF: _EXPERT_HALF, _LORA_HALF: _EXPERT_HALF},
)
GATES = Pairs(
    "Gates that are not held open",
    "WER in %, of experts whose gates are held open and of those whose gates choose, and the difference in points: "
    "above 0, held open has fewer errors. It is over the folds that both have.",
    {method.label: "experts" for method in GROUPS["gates"]},
)
TAUGHT = Pairs(
    "Experts with a teacher",
    "WER in %, of experts without and with a teacher, and the difference in points: below 0, the taught have fewer "
    "errors. It is over the folds that both have.",
    {TAUGHT_EXPERTS.label: "experts"},
)
_HELD_OPEN, _PAPERS = (method.label for method in GROUPS["full-size"])
SIZES = Pairs(
    "Full experts",
    "WER in %, of experts of low rank and of full ones, both with gates held open; and of full ones with the paper's "
    "gates in place of those. Below 0, the second has fewer errors. It is over the folds that both have. The learning "
    "rate of full experts is the first round's.",
    {_HELD_OPEN: "experts", _PAPERS: _HELD_OPEN},
)
PAIRS = {"taught": TAUGHT, "half": HALVES, "halves": AMONG_HALVES, "gates": GATES, "sizes": SIZES}


def pair_numbers(pairs: Pairs, rows: Sequence[Row]) -> dict[str, Any]:
    """
    By changed method, language and column: WER of the "base" and "changed", and their "difference".

    Columns are the splits, "both domains" (the mean of single recordings and those out of domain) and the same with
    a bounded WER. Several languages have a "mean", too.
    """
    by_label = {row.label: row for row in rows}
    numbers: dict[str, Any] = {}
    for label, base_label in pairs.bases.items():
        changed, base = by_label.get(label), by_label.get(base_label)
        if changed is None or base is None:
            continue
        folds = {language: sorted(changed.folds(language) & base.folds(language)) for language in changed.results}
        draws = {language: _draws(changed, base, language) for language, shared_folds in folds.items() if shared_folds}
        if len(draws) > 1:
            columns = next(iter(draws.values()))
            draws[MEAN] = {
                column: {name: mean([each[column][name] for each in draws.values()]) for name in NAMES}
                for column in columns
            }
        for language, cells in draws.items():
            intervals = {column: {name: interval(cell[name]) for name in NAMES} for column, cell in cells.items()}
            numbers.setdefault(label, {})[language] = intervals
            if language != MEAN:
                intervals["folds"] = folds[language]
    return numbers


def _draws(changed: Row, base: Row, language: str) -> dict[str, dict[str, np.ndarray]]:
    def of(split: str, rate_name: str) -> dict[str, np.ndarray]:
        ours, theirs = shared(changed.counts(language, split), base.counts(language, split))
        return {
            "base": rate(theirs, language, split, rate_name),
            "changed": rate(ours, language, split, rate_name),
            "difference": difference(ours, theirs, language, split, rate_name),
        }

    draws = {split: of(split, "wer") for split in SPLITS}
    for column, rate_name in ((BOTH_DOMAINS, "wer"), (BOUNDED, "bounded")):
        domains = [of(split, rate_name) for split in BOTH]
        draws[column] = {name: mean([domain[name] for domain in domains]) for name in NAMES}
    return draws


def pair_section(pairs: Pairs, numbers: Mapping[str, Any]) -> list[str]:
    """The table of `pair_numbers`; nothing if there are none."""
    if not numbers:
        return []
    columns = {**SPLITS, BOTH_DOMAINS: BOTH_DOMAINS, BOUNDED: BOUNDED}
    rows = []
    for label, languages in numbers.items():
        for language, cells in languages.items():
            where = MEAN if language == MEAN else f"{language_name(language)} {', '.join(map(str, cells['folds']))}"
            rows.append([label, where, *(_text(cells[column]) for column in columns)])
    header = ["method", "language, folds", *columns.values()]
    return [f"## {pairs.title}", "", pairs.text, "", *table(header, rows)]


def _text(cell: Mapping[str, Any]) -> str:
    base, changed = (percent(cell[name]["value"]) for name in ("base", "changed"))
    return f"{base} → {changed}: {format_interval(cell['difference'], '+')}"
