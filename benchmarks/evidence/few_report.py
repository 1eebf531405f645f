"""The tables of experts of few recordings, and of what teachers know; see `few` and `teachers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.comparison.estimates import interval
from benchmarks.comparison.folds import FOLDS
from benchmarks.comparison.methods import FINETUNED, HELD_OUT
from benchmarks.comparison.report import NONE, format_interval, percent, table
from benchmarks.comparison.speech import OUT_OF_DOMAIN
from benchmarks.comparison.store import is_measured

from .estimates import Counts, counts_of, difference, rate
from .few import EPOCHS, RECORDINGS, SPLITS, chosen_weight, taught, teacher, tuning, untaught
from .grid import TUNING_FOLD, Grid
from .rows import language_name, mean
from .teachers import NAMES as SPLITS_OF_TEACHERS
from .teachers import RECORDINGS as KNOWN_RECORDINGS
from .teachers import results_of

UNTAUGHT, TAUGHT, TEACHER = "experts", "taught experts", "their teacher"
MAKERS: dict[str, Callable[[Grid, str, int], Any]] = {UNTAUGHT: untaught, TAUGHT: taught, TEACHER: teacher}
KNOWING = {FINETUNED: "of the grid, trained on what it teaches", HELD_OUT: "trained on other recordings"}
MEAN, BOUNDED = "mean", "mean, bounded"
TEXT = (
    f"Experts of {RECORDINGS} recordings, in {EPOCHS} passes (`python -m benchmarks.evidence.few`). Their teacher, a "
    "LoRA, is trained on the other recordings of the fold's training: it shares none with them. WER in % on single "
    "recordings, and on Russian announcements. Differences in points, below 0 for fewer errors than experts without a "
    "teacher; over the folds that all three have."
)

KNOWN = (
    f"Tokens of the transcripts that a teacher predicts, given the ones before, on the first {KNOWN_RECORDINGS} "
    "recordings that it teaches and on as many of the test (`python -m benchmarks.evidence.teachers`). A teacher that "
    "errs nowhere in what it teaches has the transcripts by heart, and says little beyond them."
)


def few_numbers(grid: Grid) -> dict[str, Any]:
    """
    By label of `MAKERS` and column: intervals of the WER, and of its difference "to experts"; and the "folds".

    Columns are the languages, "mean", "mean, bounded" (WER) and "out_of_domain", which Russian alone has. Empty if no
    fold is complete.
    """
    counts: dict[str, dict[tuple[str, str], Counts]] = {}
    folds: dict[str, list[int]] = {}
    for language, splits in SPLITS.items():
        results = {label: _results(grid, make, language) for label, make in MAKERS.items()}
        folds[language] = sorted(set.intersection(*(set(found) for found in results.values())))
        for label, found in results.items():
            for split in splits:
                counts.setdefault(label, {})[language, split] = {
                    fold: counts_of(found[fold]["evaluations"][split]) for fold in folds[language]
                }
    if not all(folds.values()):
        return {}
    numbers: dict[str, Any] = {"folds": folds}
    base = counts[UNTAUGHT]
    for label, cells in counts.items():
        rates = _columns(lambda place, name, cells=cells: rate(cells[place], *place, name))
        numbers[label] = {column: {"wer": interval(draws)} for column, draws in rates.items()}
        if label != UNTAUGHT:
            apart = _columns(lambda place, name, cells=cells: difference(cells[place], base[place], *place, name))
            for column, draws in apart.items():
                numbers[label][column][f"to {UNTAUGHT}"] = interval(draws)
    return numbers


def _results(grid: Grid, make: Callable[[Grid, str, int], Any], language: str) -> dict[int, Any]:
    """The measured runs of each fold; none if tuning is missing."""
    try:
        found = {fold: grid.store.read(make(grid, language, fold)) for fold in range(FOLDS)}
    except ValueError:
        return {}
    return {fold: result for fold, result in found.items() if result is not None and is_measured(result)}


def _columns(of: Callable[[tuple[str, str], str], np.ndarray]) -> dict[str, np.ndarray]:
    """`of` takes a language and split, and the name of a rate."""
    draws = {language: of((language, "test"), "wer") for language in SPLITS}
    draws[MEAN] = mean(list(draws.values()))
    draws[BOUNDED] = mean([of((language, "test"), "bounded") for language in SPLITS])
    for language, splits in SPLITS.items():
        if OUT_OF_DOMAIN in splits:
            draws[OUT_OF_DOMAIN] = of((language, OUT_OF_DOMAIN), "wer")
    return draws


def known_section(grid: Grid) -> list[str]:
    """The table of what teachers know; nothing if it was not measured."""
    measured = results_of(grid.store).rows()
    if not measured:
        return []
    rows = []
    for name, label in KNOWING.items():
        row = [label]
        for language in SPLITS:
            for split in SPLITS_OF_TEACHERS:
                found = [m for m in measured if (m["teacher"], m["language"], m["split"]) == (name, language, split)]
                tokens = sum(each["tokens"] for each in found)
                row.append(percent(sum(each["predicted"] for each in found) / tokens) if found else NONE)
        folds = sorted({each["fold"] for each in measured if each["teacher"] == name})
        rows.append([*row, ", ".join(map(str, folds))])
    columns = [f"{language_name(language)}, {what}" for language in SPLITS for what in ("taught", "test")]
    return ["## What teachers know by heart", "", KNOWN, "", *table(["%", *columns, "folds"], rows)]


def few_section(grid: Grid, numbers: Mapping[str, Any]) -> list[str]:
    """The tables; nothing if no run is there."""
    tried = _tuning_rows(grid)
    if not tried:
        return []
    lines = ["## A teacher that has other recordings", "", TEXT, ""]
    if numbers:
        folds = "; ".join(
            f"{language_name(language)} {', '.join(map(str, found))}" for language, found in numbers["folds"].items()
        )
        columns = [*SPLITS, MEAN, BOUNDED, OUT_OF_DOMAIN]
        rows = []
        for label in MAKERS:
            cells = [numbers[label][column] for column in columns]
            rows.append([label, *(percent(cell["wer"]["value"]) for cell in cells)])
            if label != UNTAUGHT:
                apart = [format_interval(cell[f"to {UNTAUGHT}"], "+") for cell in cells]
                rows.append([f"{label}, to {UNTAUGHT}", *apart])
        names = [language_name(column) if column in SPLITS else column for column in columns[:-1]]
        lines += [f"Folds: {folds}.", "", *table(["", *names, "announcements"], rows)]
    header = [f"WER in validation, %, fold {TUNING_FOLD}", *map(language_name, SPLITS), MEAN, ""]
    return [*lines, *table(header, tried)]


def _tuning_rows(grid: Grid) -> list[list[str]]:
    """A row for each weight that has been tried in all languages."""
    try:
        by_weight = tuning(grid)
    except ValueError:  # nor is the grid tuned
        return []
    try:
        chosen = chosen_weight(grid)
    except ValueError:
        chosen = None
    rows = []
    for weight, runs in by_weight.items():
        rates = [rate for run in runs if (rate := grid.validation(run)) is not None]
        if len(rates) == len(runs):
            label = "without a teacher" if weight is None else f"weight {weight:g}"
            mark = "chosen" if weight == chosen is not None else ""
            rows.append([label, *map(percent, (*rates, sum(rates) / len(rates))), mark])
    return rows
