"""The tables of experts of few recordings, and of what teachers know; see `few` and `teachers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import mean as mean_of
from typing import Any

import numpy as np

from benchmarks.comparison.estimates import interval
from benchmarks.comparison.folds import FOLDS
from benchmarks.comparison.methods import FINETUNED, HELD_OUT
from benchmarks.comparison.report import NONE, format_interval, percent, table
from benchmarks.comparison.runs import Run
from benchmarks.comparison.speech import OUT_OF_DOMAIN
from benchmarks.comparison.store import Result, is_measured

from .estimates import counts_of, difference, rate, shared
from .few_runs import EPOCHS, KD_WEIGHTS, RECORDINGS, SPLITS, chosen_weight, taught, teacher_run, tuning, untaught
from .grid import TUNING_FOLD, Grid
from .rows import language_name, mean
from .teacher_table import RECORDINGS as KNOWN_RECORDINGS
from .teacher_table import SPLITS as KNOWN_SPLITS
from .teacher_table import results_of

COMPARED: dict[str, Callable[[Grid, str, int], Run]] = {"taught experts": taught, "their teacher": teacher_run}
TEACHERS = {FINETUNED: "of the grid, trained on what it teaches", HELD_OUT: "trained on other recordings"}
MEAN, BOUNDED = "mean", "mean, bounded"
TEXT = (
    f"Experts of {RECORDINGS} recordings, in {EPOCHS} passes (`python -m benchmarks.evidence.few`). Their teacher, a "
    "LoRA, is trained on the other recordings of the fold's training: it shares none with them. WER in %, of experts "
    "without a teacher and of what is compared, and the difference in points: below 0, it has fewer errors than they. "
    "It is over the folds that both have. Announcements are Russian."
)
TRIED = (
    f"WER in validation, %, fold {TUNING_FOLD}, by weight of the distillation. The mean chooses. A stronger one was "
    "added while the strongest had the lowest mean."
)
KNOWN = (
    f"Tokens of the transcripts that a teacher predicts, given the ones before, on the first {KNOWN_RECORDINGS} "
    "recordings that it teaches and on as many of the test (`python -m benchmarks.evidence.teachers`)."
)


def few_numbers(grid: Grid) -> dict[str, Any]:
    """
    By label of `COMPARED`: the "folds" of each language, and by column intervals of the WER of untaught experts
    ("base"), of what is compared ("changed") and of their "difference".

    Columns are the languages, "mean", "mean, bounded" (WER) and "out_of_domain", which Russian alone has. A label that
    lacks a language is left out.
    """
    numbers: dict[str, Any] = {}
    base = {language: _results(grid, untaught, language) for language in SPLITS}
    for label, make in COMPARED.items():
        changed = {language: _results(grid, make, language) for language in SPLITS}
        folds = {language: sorted(set(base[language]) & set(changed[language])) for language in SPLITS}
        if all(folds.values()):
            columns = {
                column: {name: interval(draws) for name, draws in cells.items()}
                for column, cells in _columns(base, changed).items()
            }
            numbers[label] = {"folds": folds, **columns}
    return numbers


def _results(grid: Grid, make: Callable[[Grid, str, int], Run], language: str) -> dict[int, Result]:
    """The measured runs of each fold; none if tuning is missing."""
    try:
        found = {fold: grid.store.read(make(grid, language, fold)) for fold in range(FOLDS)}
    except ValueError:
        return {}
    return {fold: result for fold, result in found.items() if result is not None and is_measured(result)}


def _columns(
    base: Mapping[str, Mapping[int, Result]], changed: Mapping[str, Mapping[int, Result]]
) -> dict[str, dict[str, np.ndarray]]:
    """By column and name, fractions [1 + draws]; see `few_numbers`."""

    def of(language: str, split: str, name: str) -> dict[str, np.ndarray]:
        theirs, ours = (
            {fold: counts_of(result["evaluations"][split]) for fold, result in runs[language].items()}
            for runs in (base, changed)
        )
        theirs, ours = shared(theirs, ours)
        return {
            "base": rate(theirs, language, split, name),
            "changed": rate(ours, language, split, name),
            "difference": difference(ours, theirs, language, split, name),
        }

    def averaged(cells: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: mean([cell[name] for cell in cells]) for name in cells[0]}

    columns = {language: of(language, "test", "wer") for language in SPLITS}
    columns[MEAN] = averaged(list(columns.values()))
    columns[BOUNDED] = averaged([of(language, "test", "bounded") for language in SPLITS])
    for language, splits in SPLITS.items():
        if OUT_OF_DOMAIN in splits:
            columns[OUT_OF_DOMAIN] = of(language, OUT_OF_DOMAIN, "wer")
    return columns


def few_section(grid: Grid, numbers: Mapping[str, Any]) -> list[str]:
    """The tables; nothing if no run is there."""
    tried = _tuning_rows(grid)
    if not tried:
        return []
    lines = ["## A teacher that has other recordings", "", TEXT, ""]
    if numbers:
        columns = [*SPLITS, MEAN, BOUNDED, OUT_OF_DOMAIN]
        rows = []
        for label, cells in numbers.items():
            folds = "; ".join(f"{language} {', '.join(map(str, found))}" for language, found in cells["folds"].items())
            rows.append([label, folds, *(_text(cells[column]) for column in columns)])
        names = [language_name(column) if column in SPLITS else column for column in columns[:-1]]
        lines += table(["", "folds", *names, "announcements"], rows)
    lines += [TRIED, "", *table(["", *map(language_name, SPLITS), MEAN, "precision", ""], tried)]
    return lines


def _text(cell: Mapping[str, Any]) -> str:
    base, changed = (percent(cell[name]["value"]) for name in ("base", "changed"))
    return f"{base} → {changed}: {format_interval(cell['difference'], '+')}"


def _tuning_rows(grid: Grid) -> list[list[str]]:
    """A row for each weight that has been tried in all languages."""
    try:
        by_weight = tuning(grid)
    except ValueError:  # nor is the grid tuned
        return []
    try:
        chosen: float | None = chosen_weight(grid)
    except ValueError:
        chosen = None
    rows = []
    for weight, runs in by_weight.items():
        rates = [rate for run in runs if (rate := grid.validation(run)) is not None]
        if len(rates) == len(runs):
            precisions = {found["settings"]["precision"] for run in runs if (found := grid.store.read(run))}
            cells = [*map(percent, (*rates, mean_of(rates))), ", ".join(sorted(precisions))]
            if weight is None:
                rows.append(["without a teacher", *cells, ""])
                continue
            at_border = weight in (min(KD_WEIGHTS), max(KD_WEIGHTS))
            mark = ("chosen, at the border" if at_border else "chosen") if weight == chosen else ""
            rows.append([f"weight {weight:g}", *cells, mark])
    return rows


def known_section(grid: Grid) -> list[str]:
    """The table of what teachers know; nothing if it was not measured."""
    measured = results_of(grid.store).rows()
    if not measured:
        return []
    rows = []
    for name, label in TEACHERS.items():
        row = [label]
        for language in SPLITS:
            for split in KNOWN_SPLITS:
                found = [m for m in measured if (m["teacher"], m["language"], m["split"]) == (name, language, split)]
                tokens = sum(each["tokens"] for each in found)
                row.append(percent(sum(each["predicted"] for each in found) / tokens) if found else NONE)
        folds = sorted({each["fold"] for each in measured if each["teacher"] == name})
        rows.append([*row, ", ".join(map(str, folds))])
    columns = [f"{language_name(language)}, {where}" for language in SPLITS for where in ("taught", "test")]
    return ["## Transcripts known by heart", "", KNOWN, "", *table(["%", *columns, "folds"], rows)]
