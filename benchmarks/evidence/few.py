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

from benchmarks.comparison.compare import add_setup_arguments, make_pool, make_setup
from benchmarks.comparison.experiment import Setup, execute, validate
from benchmarks.comparison.folds import FOLDS
from benchmarks.comparison.runs import Run, held_out_teacher
from benchmarks.comparison.store import is_measured

from .few_runs import SPLITS, student_runs, teacher_runs, tuning
from .grid import Grid
from .steps import Steps


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
            missing = [run for run in runs if lacks(run)]
            return steps.train_teachers(missing, held_out_teacher) and steps.do(study, task, runs, lacks)

        if do("tuning", validate, [run for runs in tuning(grid).values() for run in runs], lacks_validation):
            makers = [(make, fold) for make in (student_runs, teacher_runs) for fold in arguments.folds]
            all(do("few", measure, make(grid, fold), lacks_test) for make, fold in makers)
    print(f"results: {setup.store.table_dir}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
