"""The runs of experts of few recordings and of their teachers; see `few`."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

from benchmarks.comparison.methods import EXPERT, HELD_OUT
from benchmarks.comparison.runs import Run, held_out_teacher
from benchmarks.comparison.speech import OUT_OF_DOMAIN

from .grid import TUNING_FOLD, Grid, Method

SPLITS = {"ro": ("test",), "ru": ("test", OUT_OF_DOMAIN)}
RECORDINGS, EPOCHS = 100, 8
KD_WEIGHTS = (2.0, 8.0, 32.0, 128.0)  # of the distillation


def untaught(grid: Grid, language: str, fold: int) -> Run:
    """
    Experts of few recordings.

    Raises:
        ValueError: a tuning run of the grid has no results.
    """
    method = Method(EXPERT, "")
    return grid.run(method, language, fold, grid.tuned(method) | {"train_size": RECORDINGS, "epochs": EPOCHS})


def taught(grid: Grid, language: str, fold: int, weight: float | None = None) -> Run:
    """
    The same with a teacher.

    Args:
        grid (`Grid`): The grid, whose tuning chose the settings.
        language (`str`), fold (`int`): The run's.
        weight (`float`, *optional*): Of the distillation. By default the chosen one.

    Raises:
        ValueError: a tuning run has no results.
    """
    weight = chosen_weight(grid) if weight is None else weight
    return replace(untaught(grid, language, fold), teacher=HELD_OUT, kd_weight=weight)


def teacher_run(grid: Grid, language: str, fold: int) -> Run:
    """The teacher of `taught`."""
    return held_out_teacher(untaught(grid, language, fold))


def tuning(grid: Grid) -> dict[float | None, list[Run]]:
    """The runs that are measured in validation, by weight of the distillation; `None` has those without a teacher."""
    alone = [untaught(grid, language, TUNING_FOLD) for language in SPLITS]
    by_weight = {w: [taught(grid, language, TUNING_FOLD, w) for language in SPLITS] for w in KD_WEIGHTS}
    return {None: alone, **by_weight}


def chosen_weight(grid: Grid) -> float:
    """
    The weight of the lowest WER in validation, mean over languages. Ties go to the first.

    Raises:
        ValueError: a tuning run has no results.
    """
    rates: dict[float, float] = {}
    for weight, runs in tuning(grid).items():
        if weight is None:
            continue
        found = [grid.validation(run) for run in runs]
        if None in found:
            name = runs[found.index(None)].name
            raise ValueError(f"{name} has no results in {grid.store.table_dir}: run benchmarks.evidence.few again")
        rates[weight] = mean(rate for rate in found if rate is not None)
    return min(rates, key=lambda weight: rates[weight])


def student_runs(grid: Grid, fold: int) -> list[Run]:
    """The students of a fold, taught and untaught."""
    return [make(grid, language, fold) for make in (taught, untaught) for language in SPLITS]


def teacher_runs(grid: Grid, fold: int) -> list[Run]:
    """The teachers of a fold."""
    return [teacher_run(grid, language, fold) for language in SPLITS]
