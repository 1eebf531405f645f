"""
Does a teacher that knows more make better experts?

    python -m benchmarks.evidence.few --jobs 2

The teacher of the grid (`run.py`) was trained on the recordings that it teaches, and predicts their transcripts almost
without error (`teachers.py`). Here student and teacher share no recording: experts have 100 of a fold's training
recordings, in eight passes, and are taught by a LoRA of all the others. Experts have the learning rate and rank that
tuning chose in the grid, whose group `main` has to be there. Those of the teacher are fixed
(`runs.held_out_teacher`).

The weight of the distillation is chosen by WER in validation of fold 0, mean of the languages. All are measured on
single recordings, in Russian on the telephone announcements, too. Teachers are measured last. A stopped command can be
repeated.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import mean

from benchmarks.comparison.compare import add_setup_arguments, make_pool, make_setup
from benchmarks.comparison.experiment import Setup, execute, train_alone, validate
from benchmarks.comparison.folds import FOLDS
from benchmarks.comparison.methods import EXPERT, HELD_OUT
from benchmarks.comparison.runs import Run, held_out_teacher
from benchmarks.comparison.speech import OUT_OF_DOMAIN
from benchmarks.comparison.store import is_measured

from .grid import TUNING_FOLD, Grid, Method
from .steps import Steps

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


def measure(run: Run, setup: Setup) -> str:
    """`execute` on the language's splits."""
    return execute(run, setup, SPLITS[run.language])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--folds", nargs="+", type=int, choices=range(FOLDS), default=list(range(FOLDS)), help="folds")
    add("--budget_minutes", type=float, default=math.inf, help="start no runs after so many minutes")
    add_setup_arguments(parser, "evidence", "benchmarks/results/evidence")
    arguments = parser.parse_args()
    setup = make_setup(parser, arguments)
    grid = Grid(setup.store, max_steps=arguments.max_steps)
    until = time.monotonic() + 60 * arguments.budget_minutes

    def lacks_validation(run: Run) -> bool:
        return grid.validation(run) is None

    def lacks_test(run: Run) -> bool:
        result = setup.store.read(run)
        return result is None or not is_measured(result)

    with make_pool(arguments.jobs, setup) as pool:
        steps = Steps(pool, setup, until)

        def do(study: str, task: Callable[[Run, Setup], str], runs: list[Run], lacks: Callable[[Run], bool]) -> bool:
            """The runs that lack something, after the teachers of those that have to be trained."""
            taught = [run for run in runs if run.teacher and lacks(run) and steps.lacks_weights(run)]
            teachers = list(dict.fromkeys(map(held_out_teacher, taught)))
            return steps.do("teaching", train_alone, teachers, steps.lacks_weights) and steps.do(
                study, task, runs, lacks
            )

        if do("tuning", validate, [run for runs in tuning(grid).values() for run in runs], lacks_validation):
            makers = [(make, fold) for make in (student_runs, teacher_runs) for fold in arguments.folds]
            all(do("few", measure, make(grid, fold), lacks_test) for make, fold in makers)
    print(f"results: {setup.store.table_dir}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
