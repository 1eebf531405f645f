"""Does the runs that lack results, within a time, and collects what is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from benchmarks.comparison.compare import check, run_all
from benchmarks.comparison.experiment import Setup, train_alone
from benchmarks.comparison.runs import Run


@dataclass
class Steps:
    """
    Steps of a command that can be stopped and called again.

    Args:
        pool (`ProcessPoolExecutor`): Does the runs.
        setup (`Setup`): Of the command.
        until (`float`): No run is started then, in seconds of `time.monotonic`.
    """

    pool: ProcessPoolExecutor
    setup: Setup
    until: float
    studies: dict[Run, str] = field(default_factory=dict)  # the first that asked for each run

    def do(
        self, study: str, task: Callable[[Run, Setup], str], runs: Sequence[Run], lacks: Callable[[Run], bool]
    ) -> bool:
        """
        Do the runs that lack something.

        Args:
            study (`str`): What results are collected as; "teaching" trains weights, and measures nothing.
            task (`Callable`): Does a run, and returns a line about it.
            runs (`Sequence[Run]`): The runs, in order.
            lacks (`Callable`): True if a run has to be done.

        Returns:
            `bool`: False if the time was over before all were done.

        Raises:
            RuntimeError: runs have failed.
        """
        if study != "teaching":
            self.studies.update({run: study for run in runs if run not in self.studies})
        self._collect()  # also what an interrupted command left
        missing = [run for run in runs if lacks(run)]
        if time.monotonic() < self.until:
            check(run_all(self.pool, task, missing, self.setup, self.until, self._collect))
        left = [run for run in runs if lacks(run)]
        if left:
            print(f"{study}: the time is over; {len(left)} runs are left. The same command goes on there.")
        return not left

    def train_teachers(self, students: Sequence[Run], teacher_of: Callable[[Run], Run]) -> bool:
        """
        Train the teachers that are not on this machine.

        Args:
            students (`Sequence[Run]`): Runs that are about to be done. Those that have weights need no teacher.
            teacher_of (`Callable`): The run that trains the teacher of a student.

        Returns:
            `bool`: False if the time was over before all were trained.

        Raises:
            RuntimeError: runs have failed.
        """
        taught = [run for run in students if run.teacher is not None]
        untrained = [run for run in taught if self.setup.store.read(run) is None or self.lacks_weights(run)]
        return self.do("teaching", train_alone, list(dict.fromkeys(map(teacher_of, untrained))), self.lacks_weights)

    def lacks_weights(self, run: Run) -> bool:
        """True if the weights of a run are not on this machine."""
        return not self.setup.store.weights(run).exists()

    def _collect(self) -> None:
        self.setup.store.collect(self.studies)
