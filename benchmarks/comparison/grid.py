"""Runs of the comparison: reading them, and what is compared with what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparison.store import read_store, run_name

Candidate = tuple[float | None, int | None]  # learning rate and rank
Result = dict[str, Any]  # the results of a run, and its "name"

ZERO_SHOT, FULL, LORA, CLSR, LOW_RANK = "zero-shot", "full", "lora", "clsr", "low-rank"
STRAIGHT = "straight"  # straight-through gates; experts are low-rank, but in the group "rank"
ROUTED = (CLSR, LOW_RANK, STRAIGHT)
METHODS = {
    ZERO_SHOT: "zero-shot",
    FULL: "full fine-tuning",
    LORA: "LoRA",
    CLSR: "CLSR",
    LOW_RANK: "low-rank CLSR",
    STRAIGHT: "CLSR, straight-through",
}
# What a method sets otherwise than the paper: gates that are hard in training too, and less that holds experts back.
METHOD_SETTINGS = {
    STRAIGHT: {"straight_through": True, "gate_budget": 0.75, "skip_gate_prob": 0.0, "expert_dropout": 0.05},
}
FINETUNED, BASE = "finetuned", "base"  # teachers: the student's base trained on all languages; as it is, at 30 s
ALL_LANGUAGES = "all"  # of the run that trains the teacher
TUNING_LANGUAGES, TUNING_SEED = ("ro", "bg"), 0
STUDIED_LANGUAGE = "ro"  # in which single settings are changed
# What tuning tries: learning rate and rank.
CANDIDATES = {
    FULL: [(2e-5, None), (5e-5, None), (1e-4, None)],
    LORA: [(5e-4, 64), (1e-3, 64), (2e-3, 64), (4e-3, 64), (1e-3, 32), (2e-3, 32)],
    CLSR: [(1e-4, None), (2e-4, None), (5e-4, None)],
    LOW_RANK: [(1e-3, 64), (2e-3, 64), (4e-3, 64)],
    STRAIGHT: [(1e-3, 64), (2e-3, 64), (4e-3, 64)],
}
SPLITS = {"test": "in domain", "out_of_domain": "out of domain"}
# What the rows and columns of a grid are; a grid's runs are alike in every other setting that matters to their method.
AXES = ("method", "language", "seed", "teacher", "learning_rate", "rank", "student", "decoder_layers")
GATE_SETTINGS = (
    "gate_budget",
    "budget_weight",
    "skip_gate_prob",
    "gate_noise",
    "expert_dropout",
    "straight_through",
)
TEACHER_SETTINGS = ("kd_loss", "kd_weight")

# Columns of an evaluation's "utterances".
SUBSTITUTIONS, DELETIONS, INSERTIONS, WORDS, CHARACTER_ERRORS, CHARACTERS = range(6)
RATES = {
    "wer": ((SUBSTITUTIONS, DELETIONS, INSERTIONS), WORDS),
    "substitutions": ((SUBSTITUTIONS,), WORDS),
    "deletions": ((DELETIONS,), WORDS),
    "insertions": ((INSERTIONS,), WORDS),
    "cer": ((CHARACTER_ERRORS,), CHARACTERS),
}


def load(results_dir: str | Path) -> list[Result]:
    """
    Load all runs of a folder, see `store.py`, each with a "name".

    Raises:
        ValueError: a WER or CER in a file is not that of its utterances.
    """
    results = []
    for result in read_store(Path(results_dir)).values():
        result = result | {"name": run_name(result["settings"])}
        for split in (*result["evaluations"], *result.get("untouched", {})):
            check_rates(result, split)
        results += by_language(result)
    return results


def evaluation(result: Result, split: str) -> dict[str, Any]:
    """Of "validation", "test" or "out_of_domain", or what the run's training was not about."""
    evaluations = result["evaluations"]
    return evaluations[split] if split in evaluations else result["untouched"][split]


def check_rates(result: Result, split: str) -> None:
    rates = evaluation(result, split)
    if "utterances" not in rates:
        return
    totals = np.sum(rates["utterances"], axis=0)
    for name in ("wer", "cer"):
        errors, units = RATES[name]
        pooled = totals[list(errors)].sum() / totals[units]
        if abs(pooled - rates[name]) > 1e-3:
            raise ValueError(
                f"{result['name']}: the {name} of {split!r} is {rates[name]}, but its utterances give {pooled:.6f}"
            )


def by_language(result: Result) -> list[Result]:
    """A run as it is; that of all languages together (its evaluations are "ro test", "bg test", ...) as one each."""
    if result["settings"]["language"] != ALL_LANGUAGES:
        return [result]
    languages: dict[str, dict[str, Any]] = {}
    for key, rates in result["evaluations"].items():
        language, split = key.split(" ")
        languages.setdefault(language, {})[split] = rates
    together = result | {"together": True}
    return [
        together | {"settings": result["settings"] | {"language": language}, "evaluations": evaluations}
        for language, evaluations in languages.items()
    ]


def of_students(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of each student, that of the most runs first: a smaller one is a comparison of its own."""
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
    """How tables and figures call a run's method."""
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


# ------------------------------------------------------------------------------------------------ what is compared


def settings_that_matter(result: Result) -> dict[str, Any]:
    """Settings besides the axes that change what the run's method does."""
    method, teacher = method_of(result)
    if method == ZERO_SHOT:  # nothing is trained, and its context is in its label
        return {}
    ignored = set(AXES)
    if method not in ROUTED:
        ignored.update(GATE_SETTINGS)
    if not teacher:
        ignored.update(TEACHER_SETTINGS)
    return {name: value for name, value in result["settings"].items() if name not in ignored}


def is_trained_on_one(result: Result) -> bool:
    """Neither a zero-shot run, nor that of all languages together."""
    return result["settings"]["method"] != ZERO_SHOT and "together" not in result


def main_settings(results: Sequence[Result], method: str, teacher: str | None) -> dict[str, Any]:
    """
    What a method's runs of the main grid have in common: for each setting, the value that most runs have. Settings of
    gates and of distillation are the method's own, the others (data, epochs, context) those of all methods.
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
    """In what a run differs from the main grid. A setting that its file does not have is taken for the main one."""
    return {name: value for name, value in settings_that_matter(result).items() if value != main.get(name, value)}


def tuning(result: Result) -> tuple[float | None, int | None]:
    """Learning rate and rank."""
    return result["settings"]["learning_rate"], result["settings"]["rank"]


def runs_of(results: Sequence[Result], method: str, teacher: str | None) -> list[tuple[Result, dict[str, Any]]]:
    """A method's runs, of one language each, with what they differ in from the main grid."""
    main = main_settings(results, method, teacher)
    own = [result for result in results if is_trained_on_one(result) and method_of(result) == (method, teacher)]
    return [(result, changed_settings(result, main)) for result in own]


def tuning_runs(results: Sequence[Result], method: str, teacher: str | None) -> list[Result]:
    """The runs of a method's candidates with the main settings, in the tuning languages, in the tuning seed."""
    return [
        result
        for result, changed in runs_of(results, method, teacher)
        if not changed and tuning(result) in CANDIDATES.get(method, []) and "validation" in result["evaluations"]
        if place(result)[0] in TUNING_LANGUAGES and place(result)[1] == TUNING_SEED
    ]


def best_candidate(rates: dict[Candidate, dict[str, float]]) -> Candidate | None:
    """
    The candidate of the lowest WER on the validation split, mean over the tuning languages; the first of equal ones.

    Args:
        rates (`dict`): Learning rate and rank to language to WER. Candidates that lack a language do not count.
    """
    means = {
        candidate: np.mean([languages[language] for language in TUNING_LANGUAGES])
        for candidate, languages in rates.items()
        if set(TUNING_LANGUAGES) <= set(languages)
    }
    return min(means, key=means.get) if means else None


def chosen(results: Sequence[Result], method: str, teacher: str | None = None) -> Candidate | None:
    """
    Learning rate and rank of a method: the best of its candidates, by which `compare.py` runs the main grid.

    Args:
        results (`Sequence[dict]`): Contents of `results.json` files, of one student.
        method (`str`): One of `METHODS`.
        teacher (`str`, *optional*): Its teacher, as in the settings.

    Returns:
        `tuple[float | None, int | None]` or `None`: `None` where no run says which. A single one in use is the choice.
    """
    in_use = {tuning(result) for result, changed in runs_of(results, method, teacher) if not changed}
    if len(in_use) == 1:
        return in_use.pop()
    rates: dict[Candidate, dict[str, float]] = {candidate: {} for candidate in CANDIDATES.get(method, [])}
    for run in tuning_runs(results, method, teacher):
        rates[tuning(run)][place(run)[0]] = run["evaluations"]["validation"]["wer"]
    return best_candidate(rates)


def all_variations(results: Sequence[Result]) -> list[tuple[Result, dict[str, Any]]]:
    """Trained runs with their method's own learning rate and rank, and what they differ in from the main grid."""
    methods = dict.fromkeys(method_of(result) for result in results if is_trained_on_one(result))
    choices = {method: chosen(results, *method) for method in methods}
    return [
        (result, changed)
        for method, choice in choices.items()
        for result, changed in runs_of(results, *method)
        if tuning(result) == choice
    ]


def main_grid(results: Sequence[Result]) -> list[Result]:
    """The runs that differ in language, seed and method only, each method with its own learning rate and rank."""
    others = [result for result in results if not is_trained_on_one(result)]
    return others + [result for result, changed in all_variations(results) if not changed]


def by_cell(runs: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """
    Label and language to the runs there, by seed.

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


def place(result: Result) -> tuple[str, int]:
    """Language and seed."""
    return result["settings"]["language"], result["settings"]["seed"]


def with_split(runs: Sequence[Result], split: str) -> list[Result]:
    return [run for run in runs if split in run["evaluations"]]


def languages_of(runs: Sequence[Result]) -> list[str]:
    return sorted({run["settings"]["language"] for run in runs})
