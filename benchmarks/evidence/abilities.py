"""
Measure what the trainings of the second round did to abilities that they were not about.

    python -m benchmarks.evidence.abilities --jobs 2 --budget_minutes 60

takes runs with results (`python -m benchmarks.evidence.run` makes them), on the test of their fold:
- another language, Catalan (Romanian for Catalan runs): WER; of experts also if all bits are those of the unchanged
  model, logits and tokens;
- translation of the trained language into English: chrF against the English descriptions of the stamps; of experts
  with the decoder routed, and with `translate_with_shared_decoder`;
- timestamps in the trained language: recordings joined to a minute, as the table of `peft-clsr train`.

LoRA is left on in the other language. WER on joined recordings, long form, is in the results of the runs. A run whose
weights are not on this machine is trained again, after its teacher if it has one, and keeps its results. A run that is
measured is not measured again: a stopped command can be repeated.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from typing import Any

import torch

from benchmarks.comparison.compare import add_setup_arguments, check, make_pool, make_setup, run_all
from benchmarks.comparison.experiment import (
    EVAL_BATCH,
    FULL_CONTEXT,
    MAX_NEW_TOKENS_OF_LONG,
    Setup,
    count_errors,
    is_untouched,
    joined_recordings,
    load_run,
    load_split,
    train_alone,
)
from benchmarks.comparison.folds import FOLDS, GRID_LANGUAGES, LANGUAGES
from benchmarks.comparison.methods import EXPERTS, ZERO_SHOT
from benchmarks.comparison.runs import Run
from benchmarks.comparison.store import is_measured
from peft_clsr import transcribe
from peft_clsr.cli.joined import transcribe_joined
from peft_clsr.evaluation.times import time_errors

from .ability_table import AbilityTable, key_of
from .grid import GROUPS, NAMES, Grid
from .steps import Steps

RECORDINGS = 100  # of a fold's test, at most: in the other language, and translated
COMPARED = 25  # recordings whose logits are compared bit by bit


def other_language(language: str) -> str:
    """A language that a run was not trained on."""
    return "ro" if language == "ca" else "ca"


def measure_abilities(run: Run, setup: Setup) -> str:
    """
    Measure a run, after training it if its weights are gone, and write its abilities. Returns a line about it.

    Raises:
        ValueError: see `load_run`.
    """
    again = run.method != ZERO_SHOT and not setup.store.weights(run).exists()
    if again:
        train_alone(run, setup)
    started = time.monotonic()
    _, model, processor = load_run(run, setup, run.audio_seconds)
    if run.audio_seconds == FULL_CONTEXT and setup.precision == "bfloat16":
        model.to(torch.bfloat16)
    abilities = {"other": _other(run, setup, model, processor)}
    abilities |= _translations(run, setup, model, processor)
    abilities["times"] = _times(run, setup, model, processor)
    abilities["seconds"] = round(time.monotonic() - started, 1)
    AbilityTable(setup.store).write(run, abilities)
    return f"{run.name}: {'trained again, ' if again else ''}abilities measured ({abilities['seconds']:.0f} s)"


def _other(run: Run, setup: Setup, model: Any, processor: Any) -> dict[str, Any]:
    language = other_language(run.language)
    rows = load_split(setup, language, "test", processor, RECORDINGS, run.fold)
    settings = {"batch_size": EVAL_BATCH, "max_new_tokens": MAX_NEW_TOKENS_OF_LONG}
    transcripts = transcribe(model, processor, rows, language, **settings)
    compared = rows.select(range(min(COMPARED, len(rows))))
    identical = is_untouched(setup, model, compared, language) if run.method in EXPERTS else None
    utterances = count_errors(transcripts, rows["text"], language)["utterances"]
    return {"language": language, "identical": identical, "utterances": utterances}


def _translations(run: Run, setup: Setup, model: Any, processor: Any) -> dict[str, list[list[int]]]:
    """The n-grams of each translation, "translation" and for experts "shared_decoder"."""
    from sacrebleu.metrics import CHRF

    rows = load_split(setup, run.language, "test", processor, RECORDINGS, run.fold)

    def translated() -> list[list[int]]:
        settings = {"batch_size": EVAL_BATCH, "max_new_tokens": MAX_NEW_TOKENS_OF_LONG}
        texts = transcribe(model, processor, rows, run.language, task="translate", **settings)
        return CHRF()._extract_corpus_statistics(texts, [list(rows["translation"])])

    found = {"translation": translated()}
    if run.method in EXPERTS:
        config = model.peft_config[run.language]
        config.translate_with_shared_decoder = True
        found["shared_decoder"] = translated()
        config.translate_with_shared_decoder = False
    return found


def _times(run: Run, setup: Setup, model: Any, processor: Any) -> list[float | None]:
    """The error in time of each utterance of the fold's test, in seconds; see `time_errors`."""
    joined = joined_recordings(run, setup, processor, run.language)
    transcripts = transcribe_joined(model, processor, joined, run.language, EVAL_BATCH, run.name)
    errors: list[float] = []
    for transcript, said in zip(transcripts, joined.times, strict=True):
        errors += time_errors([(one["start"], one["end"]) for one in transcript.segments], said)
    return [round(error, 3) if math.isfinite(error) else None for error in errors]


def finished_runs(grid: Grid, groups: list[str]) -> list[Run]:
    """The runs of groups that have results. The others are named."""
    runs = []
    methods = []
    for method in (method for group in groups for method in grid.methods(group)):
        try:
            methods.append((method, grid.tuned(method)))
        except ValueError:
            print(f"left out: {method.label}, which is not tuned yet")
    for fold in grid.folds:
        for language in grid.languages:
            for method, tuned in methods:
                if language not in grid.languages_of(method):
                    continue
                run = grid.run(method, language, fold, tuned)
                results = grid.store.read(run)
                if results is None or not is_measured(results):
                    print(f"left out: {run.name} has no results yet")
                else:
                    runs.append(run)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    groups = [group for group in GROUPS if group != "half"]  # a half has no weights of its own
    add("--groups", nargs="+", choices=groups, default=["main"], help="groups of runs")
    add("--methods", nargs="+", choices=NAMES, default=list(NAMES), help="methods of the groups")
    add("--languages", nargs="+", choices=LANGUAGES, default=list(GRID_LANGUAGES), help="languages")
    add("--folds", nargs="+", type=int, choices=range(FOLDS), default=list(range(FOLDS)), help="folds")
    add("--budget_minutes", type=float, default=math.inf, help="measure no more runs after so many minutes")
    add_setup_arguments(parser, "evidence", "benchmarks/results/evidence")
    arguments = parser.parse_args()
    setup = make_setup(parser, arguments)
    for language in dict.fromkeys(map(other_language, arguments.languages)):
        if not (setup.data_dir / language).is_dir():
            parser.error(
                f"--data_dir {setup.data_dir} has no recordings in {language!r}: python -m benchmarks.evidence.speech "
                f"--languages {language} makes them"
            )
    grid = Grid(setup.store, arguments.languages, arguments.folds, arguments.methods, arguments.max_steps)
    until = time.monotonic() + 60 * arguments.budget_minutes
    table = AbilityTable(setup.store)
    runs = finished_runs(grid, arguments.groups)
    table.collect(runs)  # of a command that was stopped
    missing = [run for run in runs if key_of(run) not in table.read()]
    with make_pool(arguments.jobs, setup) as pool:
        if Steps(pool, setup, until).train_teachers(missing, grid.teacher) and time.monotonic() < until:
            check(run_all(pool, measure_abilities, missing, setup, until, lambda: table.collect(runs)))
    left = sum(key_of(run) not in table.read() for run in missing)
    if left:
        print(f"the time is over; {left} runs are left. The same command goes on there.")
    print(f"results: {setup.store.table_dir}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
