"""
Train and measure the grid of runs of the paper's comparison, on real speech.

    python -m benchmarks.comparison.speech              # the speech, once
    python -m benchmarks.comparison.compare --jobs 2    # the grid; called again, the missing runs
    python -m benchmarks.comparison.compare --groups tuning main --languages ro --seeds 0
    python -m benchmarks.comparison.compare --student openai/whisper-small --teacher openai/whisper-large-v3 \
        --results_dir benchmarks/results/whisper-small

The groups of the grid, each of which answers a question:
- `tuning`: which learning rate, and which rank of LoRA, suits each method, on the validation splits of two languages;
- `main`: every method, language and seed, each method as tuning chose it;
- `gate`, `budget`, `kd`, `size`, `student`: what the settings of the gates and these others do to experts with
  straight-through gates and a teacher, in Romanian; `size` and `student` beside other methods;
- `rank`: the same without a teacher, down to rank 8 and up to full experts;
- `untouched`: what the runs in Romanian did to other languages and to translation;
- `gates`: how sure the gates of the runs in Romanian are, and what their weights are worth without them.

All methods see the same utterances, in batches of one size, for as many steps. The teacher, if it is "finetuned", is
trained first: the student itself, in full, on all languages. Tables and figures: `report.py`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import traceback
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.comparison.experiment import FULL_CONTEXT, Run, Workspace, execute, measure_untouched, teacher_run
from benchmarks.comparison.gates import measure_gates
from benchmarks.comparison.grid import (
    BASE,
    CANDIDATES,
    CLSR,
    FINETUNED,
    FULL,
    LORA,
    LOW_RANK,
    METHOD_SETTINGS,
    ROUTED,
    STRAIGHT,
    STUDIED_LANGUAGE,
    TUNING_LANGUAGES,
    TUNING_SEED,
    ZERO_SHOT,
    Candidate,
    best_candidate,
)
from benchmarks.comparison.speech import AUDIO_SECONDS, LANGUAGES

# What the other groups change of one method.
CHANGES = {
    "gate": [{"skip_gate_prob": 0.2}, {"gate_noise": 0.0}, {"expert_dropout": 0.3}],
    "budget": [{"gate_budget": 0.25}, {"gate_budget": 0.5}, {"gate_budget": 1.0}, {"budget_weight": 0.0}],
    "kd": [{"teacher": BASE}, {"kd_loss": "kl"}, {"kd_weight": 0.5}, {"kd_weight": 8.0}],
    "rank": [
        {"rank": 8},
        {"rank": 32},
        *({"rank": None, "learning_rate": learning_rate} for learning_rate in (1e-4, 2e-4, 4e-4)),
    ],
}
# Groups that measure trained runs again: how, and the key of what that adds to their results.
AFTERWARDS = {"untouched": (measure_untouched, "untouched"), "gates": (measure_gates, "without_gates")}
GROUPS = ("tuning", "main", *CHANGES, "size", "student", *AFTERWARDS)
TRAIN_SIZES = (100, 200)  # beside the default
DECODER_LAYERS = 3  # of the smaller student


class Grid:
    """
    The runs of each group, in `tuning`, `main` and what measures those of `main` again of the given methods alone;
    `settings` are those that all of them share.
    """

    def __init__(
        self,
        workspace: Workspace,
        teacher: str,
        languages: list[str],
        seeds: list[int],
        methods: Collection[str] = tuple(CANDIDATES),
        **settings: Any,
    ) -> None:
        self.workspace, self.teacher, self.languages, self.seeds = workspace, teacher, languages, seeds
        self.settings = settings
        alone = [(method, None) for method in (FULL, LORA, CLSR, STRAIGHT)]
        taught = [(method, teacher) for method in (CLSR, LOW_RANK, STRAIGHT)]
        self.methods = [(method, teacher) for method, teacher in alone + taught if method in methods]

    def tuning(self, method: str, teacher: str | None) -> list[Run]:
        settings = {"teacher": teacher, "seed": TUNING_SEED} | METHOD_SETTINGS.get(method, {}) | self.settings
        return [
            Run(method, language, learning_rate=learning_rate, rank=rank, **settings)
            for language in TUNING_LANGUAGES
            for learning_rate, rank in CANDIDATES[method]
        ]

    def tuned(self, method: str, teacher: str | None) -> Run:
        """
        The method's run in the studied language, with the learning rate and rank that tuning chose.

        Raises:
            ValueError: a tuning run is missing.
        """
        runs = self.tuning(method, teacher)
        rates: dict[Candidate, dict[str, float]] = {(run.learning_rate, run.rank): {} for run in runs}
        for run in runs:
            results = self.workspace.read(run)
            if results is None:
                raise ValueError(f"{self.workspace.results(run)} is missing: run the group 'tuning' first")
            rates[run.learning_rate, run.rank][run.language] = results["evaluations"]["validation"]["wer"]
        learning_rate, rank = best_candidate(rates)
        return replace(runs[0], language=STUDIED_LANGUAGE, learning_rate=learning_rate, rank=rank)

    def runs(self, group: str) -> list[Run]:
        """The runs of a group, of which all but `tuning` need the results of that."""
        if group == "tuning":
            return [run for method in self.methods for run in self.tuning(*method)]
        if group == "main":
            runs = [
                replace(self.tuned(*method), language=language)
                for method in self.methods
                for language in self.languages
            ]
            zero_shot = [
                Run(ZERO_SHOT, language, audio_seconds=seconds, **self.settings)
                for language in self.languages
                for seconds in (FULL_CONTEXT, AUDIO_SECONDS)
            ]
            return zero_shot + [replace(run, seed=seed) for seed in self.seeds for run in runs]
        if group == "size":
            methods = [(LORA, None), (CLSR, self.teacher), (STRAIGHT, self.teacher)]
            runs = [replace(self.tuned(*method), train_size=size) for size in TRAIN_SIZES for method in methods]
        elif group == "student":
            methods = [(FULL, None), (LORA, None), (STRAIGHT, None), (STRAIGHT, self.teacher)]
            runs = [replace(self.tuned(*method), decoder_layers=DECODER_LAYERS) for method in methods]
        else:
            best = self.tuned(STRAIGHT, None if group == "rank" else self.teacher)
            runs = [replace(best, **change) for change in CHANGES[group]]
        return [replace(run, seed=seed) for seed in self.seeds for run in runs]

    def afterwards(self, group: str) -> list[Run]:
        """The runs of `main`, in one language, that a group of `AFTERWARDS` measures again."""
        runs = [replace(self.tuned(*method), seed=seed) for seed in self.seeds for method in self.methods]
        if group == "gates":
            return [run for run in runs if run.method in ROUTED]
        return [Run(ZERO_SHOT, STUDIED_LANGUAGE, audio_seconds=FULL_CONTEXT, **self.settings), *runs]


def run_all(pool: ProcessPoolExecutor, task: Any, runs: list[Run], workspace: Workspace) -> list[str]:
    """
    Do the runs in the order given; a line on each as it is done. One that fails does not stop the others.

    Returns:
        `list[str]`: The names of those that failed; what they raised is printed.
    """
    futures = {pool.submit(task, run, workspace): run for run in dict.fromkeys(runs)}
    failed = []
    for done, future in enumerate(as_completed(futures), 1):
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
        raise RuntimeError(f"{len(failed)} runs failed, a second call tries them again: {', '.join(failed)}")


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
        help="of the groups tuning and main",
    )
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=list(LANGUAGES), help="of the group main")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of all groups but tuning")
    parser.add_argument("--student", default=".cache/whisper-base", help="Whisper to improve: folder or Hub id")
    parser.add_argument(
        "--teacher",
        default=FINETUNED,
        help=f"'{FINETUNED}': the student, trained in full on all languages; '{BASE}': the student as it is, at 30 s; "
        "or a folder or Hub id",
    )
    parser.add_argument("--data_dir", type=Path, default=Path(".cache/compare"), help="folder that speech.py wrote")
    parser.add_argument(
        "--results_dir", type=Path, default=Path("benchmarks/results/whisper-base"), help="folder of the table"
    )
    parser.add_argument(
        "--work_dir", type=Path, default=Path("runs/compare"), help="folder of new runs and of weights"
    )
    parser.add_argument(
        "--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of training, by autocast"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--max_steps", type=int, default=-1, help="stop each training after so many steps, for a try")
    parser.add_argument("--max_utterances", type=int, help="use the first so many of each split, for a try")
    arguments = parser.parse_args()
    if not arguments.data_dir.is_dir():
        parser.error(
            f"--data_dir {arguments.data_dir} does not exist: python -m benchmarks.comparison.speech makes it"
        )
    is_try = arguments.max_steps != -1 or arguments.max_utterances is not None
    for name in ("results_dir", "work_dir"):
        if is_try and getattr(arguments, name) == parser.get_default(name):
            parser.error(f"--max_steps and --max_utterances are for a try: give it a --{name} of its own")
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    workspace = Workspace(
        arguments.student,
        arguments.data_dir,
        arguments.results_dir,
        arguments.work_dir,
        arguments.precision,
        threads,
        arguments.max_utterances,
    )
    grid = Grid(
        workspace,
        arguments.teacher,
        arguments.languages,
        arguments.seeds,
        arguments.methods,
        max_steps=arguments.max_steps,
    )
    groups = arguments.groups

    def train(runs: list[Run]) -> None:
        """Do what is missing of the runs, and first the teacher of those that need it."""
        missing = [run for run in runs if workspace.read(run) is None]
        taught = [run for run in missing if run.teacher == FINETUNED]
        first = [run for run in missing if run.teacher != FINETUNED]
        teacher = teacher_run(arguments.max_steps)
        if taught and (workspace.read(teacher) is None or not workspace.weights(teacher).exists()):
            first.insert(0, teacher)
        check([name for some in (first, taught) for name in run_all(pool, execute, some, workspace)])

    # Processes are spawned with these: what a thread too many costs is a multiple of what it brings.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        if "tuning" in groups:
            train(grid.runs("tuning"))
        train([run for group in groups if group not in ("tuning", *AFTERWARDS) for run in grid.runs(group)])
        for group, (task, key) in AFTERWARDS.items():
            if group in groups:
                runs = [run for run in grid.afterwards(group) if key not in (workspace.read(run) or {})]
                here = [run for run in runs if run.method == ZERO_SHOT or workspace.weights(run).exists()]
                if len(here) < len(runs):
                    left_out = len(runs) - len(here)
                    print(f"{group}: left out {left_out} runs, whose weights are not in {workspace.work_dir}")
                check(run_all(pool, task, here, workspace))
    print(f"{workspace.collect()} runs in {arguments.results_dir}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
