"""The table of what half of a training keeps: in its domain, and out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.comparison.estimates import interval
from benchmarks.comparison.report import format_interval, percent, table

from .estimates import difference, rate, shared
from .grid import GROUPS
from .rows import BOTH, SPLITS, Row, language_name

MEAN = "both domains"


def half_numbers(rows: Sequence[Row]) -> dict[str, Any]:
    """By label, language and split (or "both domains"): WER of the "whole" and the "half", and their "difference"."""
    by_label = {row.label: row for row in rows}
    numbers: dict[str, Any] = {}
    for method in GROUPS["half"]:
        half, whole = by_label.get(method.label), by_label.get(_whole(method.label))
        if half is None or whole is None:
            continue
        for language in half.results:
            folds = sorted(half.folds(language) & whole.folds(language))
            if folds:
                numbers.setdefault(method.label, {})[language] = {"folds": folds, **_compare(half, whole, language)}
    return numbers


def _whole(label: str) -> str:
    return label.removesuffix(", half")


def _compare(half: Row, whole: Row, language: str) -> dict[str, Any]:
    draws: dict[str, dict[str, np.ndarray]] = {}
    for split in SPLITS:
        ours, theirs = shared(half.counts(language, split), whole.counts(language, split))
        draws[split] = {
            "half": rate(ours, language, split, "wer"),
            "whole": rate(theirs, language, split, "wer"),
            "difference": difference(ours, theirs, language, split, "wer"),
        }
    names = ("half", "whole", "difference")
    draws[MEAN] = {name: np.mean([draws[split][name] for split in BOTH], axis=0) for name in names}
    return {split: {name: interval(each) for name, each in cells.items()} for split, cells in draws.items()}


def half_section(numbers: dict[str, Any]) -> list[str]:
    """The table of `half_numbers`; nothing if there are none."""
    if not numbers:
        return []
    rows = []
    for label, languages in numbers.items():
        for language, cells in languages.items():
            folds = f"{language_name(language)} {', '.join(map(str, cells['folds']))}"
            rows.append([_whole(label), folds, *(_text(cells[split]) for split in (*SPLITS, MEAN))])
    text = (
        "WER in %, of all that was trained and of half of it (`peft_clsr.scale_expert`; the same of LoRA and of full "
        "fine-tuning), and the difference in points: below 0, half has fewer errors. It is over the folds that both "
        "have. Half is not tuned."
    )
    header = ["method", "language, folds", *SPLITS.values(), MEAN]
    return ["## Half of what was trained", "", text, "", *table(header, rows)]


def _text(cell: dict[str, Any]) -> str:
    whole, half = (percent(cell[name]["value"]) for name in ("whole", "half"))
    return f"{whole} → {half}: {format_interval(cell['difference'], '+')}"
