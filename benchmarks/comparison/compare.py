"""
Train and measure the runs of the comparison.

    python -m benchmarks.comparison.speech               # the speech, once
    python -m benchmarks.comparison.compare --jobs 2     # the whole grid; runs with results are not trained again
    python -m benchmarks.comparison.compare --groups tuning main --languages ro --seeds 0
    python -m benchmarks.comparison.compare --student openai/whisper-small --teacher openai/whisper-large-v3

Groups of runs, and the question that each answers:
- `tuning`: which learning rate, and which rank of LoRA, suits each method? Validation splits of two languages;
- `main`: how do the methods compare? Every method, language and seed, each method as tuned;
- `gate`, `budget`, `kd`, `size`, `student`: what do single settings change? Taught experts with straight-through
  gates, in Romanian; `size` and `student` have other methods, too;
- `rank`: the same without a teacher, from rank 8 to full experts;
- `untouched`: what happened to other languages and to translation? The main runs in Romanian;
- `gates`: how sure are the gates, and what are they worth? The main runs in Romanian.

All methods see the same utterances, in batches of one size, for as many steps. The teacher "finetuned", the student
itself, fully fine-tuned on all languages, is trained first. Results are collected into one table for each student
(`store.py`); `python -m benchmarks.comparison.report` makes tables and figures of it.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from peft_clsr.distillation.arguments import has_bfloat16_instructions

from .experiment import Setup, execute, measure_untouched
from .gates import measure_gates
from .grid import TRAINED_GROUPS, Grid
from .methods import BASE, CANDIDATES, FINETUNED, ZERO_SHOT
from .runs import Run, teacher_run
from .speech import LANGUAGES
from .store import ResultStore

# Groups that measure trained runs again: the function, and the key that it adds to results.
MEASURED_AGAIN = {"untouched": (measure_untouched, "untouched"), "gates": (measure_gates, "without_gates")}
GROUPS = (*TRAINED_GROUPS, *MEASURED_AGAIN)


def run_all(
    pool: ProcessPoolExecutor,
    task: Any,
    runs: list[Run],
    setup: Setup,
    until: float = math.inf,
    after: Callable[[], Any] = lambda: None,
) -> list[str]:
    """
    Do the runs in the given order, each once, and print a line for each. A failed run does not stop the others.

    Args:
        pool (`ProcessPoolExecutor`): Does them.
        task (`Callable`): Takes a run and the setup, and returns the line.
        runs (`list[Run]`): The runs.
        setup (`Setup`): Given to each.
        until (`float`, *optional*): No run is added then, in seconds of `time.monotonic`. Those that the pool has
            taken are finished: one more than it has processes.
        after (`Callable`, *optional*): Called after each run.

    Returns:
        `list[str]`: The names of failed runs. Their exceptions are printed.
    """
    futures = {pool.submit(task, run, setup): run for run in dict.fromkeys(runs)}
    failed = []
    for done, future in enumerate(as_completed(futures), 1):
        if time.monotonic() >= until:
            for other in futures:
                other.cancel()
        if future.cancelled():
            continue
        after()
        if future.exception() is not None:
            failed.append(futures[future].name)
            traceback.print_exception(future.exception())
            print(f"[{done}/{len(futures)}] {futures[future].name}: failed", flush=True)
        else:
            print(f"[{done}/{len(futures)}] {future.result()}", flush=True)
    return failed


def check(failed: list[str]) -> None:
    """
    Raises:
        RuntimeError: runs have failed.
    """
    if failed:
        raise RuntimeError(f"{len(failed)} runs failed, call this again to repeat them: {', '.join(failed)}")


def add_setup_arguments(parser: argparse.ArgumentParser, name: str, results: str) -> None:
    """
    Add the options that `make_setup` reads.

    Args:
        parser (`argparse.ArgumentParser`): The command's.
        name (`str`): Name of the folders of speech and of work.
        results (`str`): Folder of the tables.
    """
    add = parser.add_argument
    add("--student", default=".cache/whisper-base", help="Whisper to improve: folder or Hub id")
    add("--data_dir", type=Path, default=Path(".cache", name), help="folder that speech wrote")
    add("--results_dir", type=Path, default=Path(results), help="tables, a folder for each student")
    add("--work_dir", type=Path, default=Path("runs", name), help="weights, and results that are not collected yet")
    precision = "bfloat16" if torch.cuda.is_available() or has_bfloat16_instructions() else "float32"
    add("--precision", choices=["bfloat16", "float32"], default=precision, help="precision of training, by autocast")
    add("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    add("--max_steps", type=int, default=-1, help="stop trainings after so many steps, for a trial")
    add("--max_utterances", type=int, help="use only the first utterances of each split, for a trial")


def make_setup(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Setup:
    """The setup of a command's runs. Ends the command if the speech is missing, or a trial would mix with results."""
    if not arguments.data_dir.is_dir():
        parser.error(f"--data_dir {arguments.data_dir} does not exist: the module speech beside this makes it")
    is_trial = arguments.max_steps != -1 or arguments.max_utterances is not None
    for name in ("results_dir", "work_dir"):
        if is_trial and getattr(arguments, name) == parser.get_default(name):
            parser.error(f"--max_steps and --max_utterances are for a trial: give it a --{name} of its own")
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    store = ResultStore(arguments.results_dir, arguments.work_dir, Path(arguments.student).name)
    return Setup(arguments.student, arguments.data_dir, store, arguments.precision, threads, arguments.max_utterances)


def make_pool(jobs: int, setup: Setup) -> ProcessPoolExecutor:
    """Processes that do runs."""
    # They inherit this: too many threads cost far more time than they save, and bars of several processes mix.
    os.environ |= {"OMP_NUM_THREADS": str(setup.threads), "TQDM_DISABLE": "1"}
    return ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_the_command
    )


def _end_with_the_command() -> None:
    """Ends this process when the command was killed: else a run would go on, and its successor start it again."""

    def watch() -> None:
        multiprocessing.parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--groups", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=f"of {GROUPS}"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(CANDIDATES),
        default=list(CANDIDATES),
        help="methods of the groups tuning and main",
    )
    parser.add_argument(
        "--languages", nargs="+", choices=LANGUAGES, default=list(LANGUAGES), help="languages of the group main"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of all groups but tuning")
    add_setup_arguments(parser, "compare", "benchmarks/results")
    parser.add_argument(
        "--teacher",
        default=FINETUNED,
        help=f"'{FINETUNED}': the student, fine-tuned on all languages; '{BASE}': the unchanged student at 30 s; "
        "or a folder or Hub id",
    )
    arguments = parser.parse_args()
    setup = make_setup(parser, arguments)
    store = setup.store
    grid = Grid(
        store,
        arguments.teacher,
        arguments.languages,
        arguments.seeds,
        arguments.methods,
        max_steps=arguments.max_steps,
    )
    teacher = teacher_run(arguments.max_steps)
    studies = {teacher: "teacher"} | dict.fromkeys(grid.runs("tuning"), "tuning")

    def train(groups: list[str]) -> None:
        """Do the runs of the groups that have no results, and first the teacher if one of them needs it."""
        runs = [(run, group) for group in groups for run in grid.runs(group)]
        for run, group in runs:
            studies.setdefault(run, group)
        missing = [run for run, _ in runs if store.read(run) is None]
        taught = [run for run in missing if run.teacher == FINETUNED]
        first = [run for run in missing if run.teacher != FINETUNED]
        if taught and (store.read(teacher) is None or not store.weights(teacher).exists()):
            first.insert(0, teacher)
        failed = []
        for some in (first, taught):
            failed += run_all(pool, execute, some, setup)
            store.collect(studies)
        check(failed)

    def measure_again(group: str) -> None:
        """Measure the runs that have weights here and were not measured yet."""
        task, key = MEASURED_AGAIN[group]
        runs = [run for run in grid.measured_again(group) if key not in (store.read(run) or {})]
        here = [run for run in runs if run.method == ZERO_SHOT or store.weights(run).exists()]
        if len(here) < len(runs):
            print(f"{group}: left out {len(runs) - len(here)} runs: their weights are not in {arguments.work_dir}")
        failed = run_all(pool, task, here, setup)
        store.collect(studies | dict.fromkeys(here, "main"))
        check(failed)

    with make_pool(arguments.jobs, setup) as pool:
        if "tuning" in arguments.groups:
            train(["tuning"])
        train([group for group in TRAINED_GROUPS if group in arguments.groups and group != "tuning"])
        for group in MEASURED_AGAIN:
            if group in arguments.groups:
                measure_again(group)
    print(f"results: {store.table_dir}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
