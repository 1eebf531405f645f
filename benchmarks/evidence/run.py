"""
Train and measure the runs of the second round.

    python -m benchmarks.evidence.speech                         # the recordings, once
    python -m benchmarks.evidence.run --jobs 2                   # the grid; runs with results are not trained again
    python -m benchmarks.evidence.run --jobs 2 --budget_minutes 240 --groups main

Groups, in this order, each tuned first:
- `main`: the unchanged model, full fine-tuning, LoRA and experts;
- `half`: the same three, trained as in `main`, with half of what was trained (`peft_clsr.scale_expert`), in Russian;
- `kd`: experts with a teacher. Tuning chooses the weight of the distillation, and if it falls to 0;
- `gates`: experts whose gates may close from the start, a candidate of `main`'s tuning; and experts whose gates start
  undecided, with noise that falls to 0, at a budget of 0.75. The second have the learning rate and rank of `main`'s
  experts;
- `full-size`: full experts, with gates held open and with the paper's gates, in Russian. They are not tuned on their
  own (`grid.FULL_SIZE`).

All methods pass four times over the same recordings, packed to windows of 30 s. There is a teacher for each fold: the
student, fully fine-tuned on the three languages of the grid in six passes with SpecAugment, without the test texts of
the fold. A teacher is measured after its students. Tuning measures validation alone; what it chose is measured further
from its weights. A stopped command can be repeated. It runs on a GPU if there is one.
"""

from __future__ import annotations

import argparse
import math
import sys
import time

from benchmarks.comparison.compare import add_setup_arguments, make_pool, make_setup
from benchmarks.comparison.experiment import execute, validate
from benchmarks.comparison.folds import FOLDS, GRID_LANGUAGES, LANGUAGES
from benchmarks.comparison.runs import Run
from benchmarks.comparison.store import is_measured

from .grid import GROUPS, NAMES, Grid
from .steps import Steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of runs")
    add("--methods", nargs="+", choices=NAMES, default=list(NAMES), help="methods of the groups")
    add("--languages", nargs="+", choices=LANGUAGES, default=list(GRID_LANGUAGES), help="languages")
    add("--folds", nargs="+", type=int, choices=range(FOLDS), default=list(range(FOLDS)), help="folds")
    add("--budget_minutes", type=float, default=math.inf, help="start no runs after so many minutes")
    add_setup_arguments(parser, "evidence", "benchmarks/results/evidence")
    arguments = parser.parse_args()
    setup = make_setup(parser, arguments)
    store = setup.store
    grid = Grid(store, arguments.languages, arguments.folds, arguments.methods, arguments.max_steps)
    until = time.monotonic() + 60 * arguments.budget_minutes

    def lacks(run: Run, study: str) -> bool:
        """True if the run has no results: of validation for tuning, of the test otherwise."""
        results = store.read(run)
        return results is None or (grid.validation(run) is None if study == "tuning" else not is_measured(results))

    def do(study: str, runs: list[Run]) -> bool:
        """The runs of a step that lack something, after the teachers of those that have to be trained."""
        missing = [run for run in runs if lacks(run, study)]
        task = validate if study == "tuning" else execute
        return steps.train_teachers(missing, grid.teacher) and steps.do(
            study, task, runs, lambda run: lacks(run, study)
        )

    def do_group(group: str) -> bool:
        """The group's tuning, whose steps follow from the ones before; its runs; and what its teachers can do."""
        if not any(map(grid.languages_of, grid.methods(group))):
            print(f"{group}: nothing to run with these --methods and --languages")
            return True
        tuned = all(do("tuning", runs(group)) for runs in (grid.tuning, grid.finals, grid.taught_tuning))
        return tuned and do(group, grid.runs(group)) and do("teacher", grid.teachers(group))

    with make_pool(arguments.jobs, setup) as pool:
        steps = Steps(pool, setup, until)
        all(do_group(group) for group in arguments.groups)
    print(f"results: {store.table_dir}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
