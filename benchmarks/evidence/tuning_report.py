"""The table of what tuning tried, and what it chose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.comparison.report import NONE, format_tuning, percent, table
from benchmarks.comparison.runs import Run

from .grid import (
    CANDIDATES,
    DISTILLATIONS,
    FINAL_LANGUAGE,
    FINALISTS,
    HELD_OPEN,
    METHODS,
    TAUGHT_EXPERTS,
    TUNING_FOLD,
    TUNING_LANGUAGES,
    Grid,
    Settings,
)
from .rows import language_name

TEXT = (
    f"WER in validation, %, fold {TUNING_FOLD}. The {FINALISTS} candidates of the lowest mean in "
    f"{' and '.join(map(language_name, TUNING_LANGUAGES))} are compared in {language_name(FINAL_LANGUAGE)} too. The "
    "lowest mean of all is chosen, of equal ones the first. Test recordings have no part in it. The distillation is "
    "chosen in the first two languages alone. Not tuned on their own: taught experts and those with noise that falls, "
    "which have the experts' learning rate and rank; and full experts, which have what the first round's tuning chose "
    "for the paper's gates. 'Held open': a budget of 1 at weight 1, and no dropout of the expert."
)


def tuning_section(grid: Grid) -> list[str]:
    """Empty if nothing has been tried."""
    rows = []
    for name, candidates in CANDIDATES.items():
        label = next(method.label for method in METHODS if method.name == name)
        rows += _rows(grid, label, candidates, grid.candidates(name), _or_none(lambda name=name: grid.chosen(name)))
    taught = _or_none(grid.taught_candidates) or []
    rows += _rows(grid, TAUGHT_EXPERTS.label, DISTILLATIONS, taught, _or_none(grid.chosen_distillation))
    header = ["method", "candidate", *TUNING_LANGUAGES, FINAL_LANGUAGE, ""]
    return ["## Tuning", "", TEXT, "", *table(header, rows)] if rows else []


def _rows(
    grid: Grid, label: str, candidates: Sequence[Settings], runs: Sequence[Run], chosen: Settings | None
) -> list[list[str]]:
    """A row for each candidate that has been tried. `runs` has those of the first candidate first."""
    rows, number = [], len(TUNING_LANGUAGES)
    for place, candidate in enumerate(candidates):
        own = runs[number * place : number * (place + 1)]
        rates = [grid.validation(run) for run in (*own, *(replace(run, language=FINAL_LANGUAGE) for run in own[:1]))]
        if any(rate is not None for rate in rates):
            cells = [NONE if rate is None else percent(rate) for rate in rates]
            rows.append([label, _text(candidate), *cells, _mark(candidate, candidates) if candidate == chosen else ""])
    return rows


def _text(candidate: Settings) -> str:
    if "kd_weight" in candidate:
        return f"weight {candidate['kd_weight']:g}" + ", falling to 0" * candidate["kd_decay"]
    is_open = candidate.items() >= HELD_OPEN.items()
    return format_tuning((candidate["learning_rate"], candidate["rank"])) + ", gates held open" * is_open


def _mark(candidate: Settings, candidates: Sequence[Settings]) -> str:
    """A note on the chosen candidate: a better one may lie beyond the lowest and the highest that were tried."""
    strength = next(iter(candidate))  # the learning rate, or the weight of the distillation
    values = [each[strength] for each in candidates]
    return "chosen, at the border" if candidate[strength] in (min(values), max(values)) else "chosen"


def _or_none(function: Callable[[], Any]) -> Any:
    """Returns the function's value, `None` if runs of tuning are missing."""
    try:
        return function()
    except ValueError:
        return None
