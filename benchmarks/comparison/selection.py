"""Which runs are compared with each other, and the labels of methods in tables and figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .methods import (
    CANDIDATES,
    FINETUNED,
    GATE_SETTINGS,
    METHODS,
    ROUTED,
    TEACHER_SETTINGS,
    TUNING_LANGUAGES,
    TUNING_SEED,
    ZERO_SHOT,
    Candidate,
)
from .store import Result

# Rows and columns of a grid. Its runs share every other setting that matters to their method.
AXES = ("method", "language", "seed", "teacher", "learning_rate", "rank", "student", "decoder_layers")


def evaluation(result: Result, split: str) -> dict[str, Any]:
    """The evaluation of "validation", "test" or "out_of_domain", or of a key of "untouched"."""
    evaluations = result["evaluations"]
    return evaluations[split] if split in evaluations else result["untouched"][split]


def of_students(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of each student, the student with the most runs first. A student of fewer layers counts as another."""
    students: dict[str, list[Result]] = {}
    for result in results:
        students.setdefault(student_name(result["settings"]), []).append(result)
    return dict(sorted(students.items(), key=lambda item: (-len(item[1]), item[0])))


def student_name(settings: dict[str, Any]) -> str:
    layers = settings.get("decoder_layers")
    return Path(settings["student"]).name + (f" with {layers} decoder layers" if layers else "")


def method_of(result: Result) -> tuple[str, str | None]:
    """Method and teacher."""
    return result["settings"]["method"], result["settings"].get("teacher")


def label(result: Result) -> str:
    """The name of a run's method and teacher in tables and figures."""
    method, teacher = method_of(result)
    if method == ZERO_SHOT:
        return f"{student_name(result['settings'])}, zero-shot ({result['settings']['audio_seconds']:g} s)"
    name = METHODS[method] + (" of all languages together" if "together" in result else "")
    if teacher:
        name += " + KD" + ("" if teacher == FINETUNED else f" ({Path(teacher).name} teacher)")
    return name


def in_order(results: Sequence[Result]) -> list[str]:
    """The labels of the runs, in the order of rows and bars."""

    def rank(result: Result) -> tuple:
        method, teacher = method_of(result)
        seconds = result["settings"]["audio_seconds"]
        others = teacher not in (None, FINETUNED), teacher or "", -seconds
        return list(METHODS).index(method), "together" in result, *others

    return list(dict.fromkeys(label(result) for result in sorted(results, key=rank)))


def language_and_seed(result: Result) -> tuple[str, int]:
    return result["settings"]["language"], result["settings"]["seed"]


def with_split(runs: Sequence[Result], split: str) -> list[Result]:
    """The runs that were evaluated on the split."""
    return [run for run in runs if split in run["evaluations"]]


def languages_of(runs: Sequence[Result]) -> list[str]:
    return sorted({run["settings"]["language"] for run in runs})


# --------------------------------------------------------------------------------------------- main and other settings


def settings_that_matter(result: Result) -> dict[str, Any]:
    """The settings that have an effect on the run's method, without `AXES`."""
    method, teacher = method_of(result)
    if method == ZERO_SHOT:  # nothing is trained, and the label has the context
        return {}
    ignored = set(AXES)
    if method not in ROUTED:
        ignored.update(GATE_SETTINGS)
    if not teacher:
        ignored.update(TEACHER_SETTINGS)
    return {name: value for name, value in result["settings"].items() if name not in ignored}


def is_trained_on_one(result: Result) -> bool:
    """True if the run was trained on a single language."""
    return result["settings"]["method"] != ZERO_SHOT and "together" not in result


def main_settings(results: Sequence[Result], method: str, teacher: str | None) -> dict[str, Any]:
    """
    The settings of a method's main runs: for each setting, the most frequent value.

    Settings of gates and of distillation are counted over the method's runs, others (data, epochs, context) over all.
    """
    every = list(filter(is_trained_on_one, results))
    own = [result for result in every if method_of(result) == (method, teacher)]
    main = {}
    for name in sorted({name for result in own for name in settings_that_matter(result)}):
        voters = own if name in GATE_SETTINGS + TEACHER_SETTINGS else every
        votes, all_votes = (
            Counter(r["settings"][name] for r in some if name in r["settings"]) for some in (voters, every)
        )
        main[name] = max(votes, key=lambda value: (votes[value], all_votes[value], str(value)))
    return main


def changed_settings(result: Result, main: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that differ from the main ones. A setting that the run does not have counts as equal."""
    return {name: value for name, value in settings_that_matter(result).items() if value != main.get(name, value)}


def runs_of(results: Sequence[Result], method: str, teacher: str | None) -> list[tuple[Result, dict[str, Any]]]:
    """A method's runs on a single language, each with its `changed_settings`."""
    main = main_settings(results, method, teacher)
    own = [result for result in results if is_trained_on_one(result) and method_of(result) == (method, teacher)]
    return [(result, changed_settings(result, main)) for result in own]


# -------------------------------------------------------------------------------------------------------------- tuning


def tuning(result: Result) -> Candidate:
    """Learning rate and rank."""
    return result["settings"]["learning_rate"], result["settings"]["rank"]


def tuning_runs(results: Sequence[Result], method: str, teacher: str | None) -> list[Result]:
    """The runs of a method's candidates: main settings, tuning languages, tuning seed."""
    return [
        result
        for result, changed in runs_of(results, method, teacher)
        if not changed and tuning(result) in CANDIDATES.get(method, []) and "validation" in result["evaluations"]
        if result["settings"]["language"] in TUNING_LANGUAGES and result["settings"]["seed"] == TUNING_SEED
    ]


def best_candidate(rates: dict[Candidate, dict[str, float]]) -> Candidate | None:
    """
    The candidate with the lowest WER on the validation split, mean over the tuning languages. Ties go to the first.

    Args:
        rates (`dict`): WER by learning rate and rank, then language. Candidates that lack a language do not count.
    """
    means = {
        candidate: np.mean([by_language[language] for language in TUNING_LANGUAGES])
        for candidate, by_language in rates.items()
        if set(TUNING_LANGUAGES) <= set(by_language)
    }
    return min(means, key=means.get) if means else None


def chosen(results: Sequence[Result], method: str, teacher: str | None = None) -> Candidate | None:
    """
    The learning rate and rank of a method's main runs: its best candidate, as in `grid.Grid.tuned`.

    Args:
        results (`Sequence[dict]`): Results of one student.
        method (`str`): One of `METHODS`.
        teacher (`str`, *optional*): The teacher, as in the settings.

    Returns:
        `tuple[float | None, int | None]` or `None`: If all runs have one learning rate and rank, these. `None` if the
        runs do not tell.
    """
    in_use = {tuning(result) for result, changed in runs_of(results, method, teacher) if not changed}
    if len(in_use) == 1:
        return in_use.pop()
    rates: dict[Candidate, dict[str, float]] = {candidate: {} for candidate in CANDIDATES.get(method, [])}
    for run in tuning_runs(results, method, teacher):
        rates[tuning(run)][run["settings"]["language"]] = run["evaluations"]["validation"]["wer"]
    return best_candidate(rates)


# ------------------------------------------------------------------------------------------------------- the main grid


def all_variations(results: Sequence[Result]) -> list[tuple[Result, dict[str, Any]]]:
    """The trained runs with the `chosen` learning rate and rank of their method, each with its `changed_settings`."""
    methods = dict.fromkeys(method_of(result) for result in results if is_trained_on_one(result))
    choices = {method: chosen(results, *method) for method in methods}
    return [
        (result, changed)
        for method, choice in choices.items()
        for result, changed in runs_of(results, *method)
        if tuning(result) == choice
    ]


def main_grid(results: Sequence[Result]) -> list[Result]:
    """The main runs of all methods, languages and seeds. Methods differ in their `chosen` learning rate and rank."""
    others = [result for result in results if not is_trained_on_one(result)]
    return others + [result for result, changed in all_variations(results) if not changed]


def by_cell(runs: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """
    Group runs by label and language; the runs of a group are in the order of their seeds.

    Raises:
        ValueError: two runs have the same label, language and seed.
    """
    cells: dict[tuple[str, str], dict[int, Result]] = {}
    for run in runs:
        seeds = cells.setdefault((label(run), run["settings"]["language"]), {})
        other = seeds.setdefault(run["settings"]["seed"], run)
        if other is not run:
            raise ValueError(
                f"{other['name']} and {run['name']} are the same run ({label(run)}, {run['settings']['language']}, "
                f"seed {run['settings']['seed']}): remove one"
            )
    return {cell: [seeds[seed] for seed in sorted(seeds)] for cell, seeds in cells.items()}
