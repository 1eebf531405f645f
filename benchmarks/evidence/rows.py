"""The rows of the report: methods, each with the runs that exist, of those that the grid expects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import langcodes
import numpy as np

from benchmarks.comparison.folds import FOLDS, LANGUAGES
from benchmarks.comparison.methods import EXPERTS
from benchmarks.comparison.runs import teacher_run
from benchmarks.comparison.speech import OUT_OF_DOMAIN
from benchmarks.comparison.store import Result, is_measured

from .ability_table import Abilities, AbilityTable, key_of
from .estimates import Counts, counts_of, rate
from .grid import GROUPS, METHODS, Grid

SPLITS = {"test": "single recordings", "joined": "joined recordings", OUT_OF_DOMAIN: "out of domain"}
BOTH = ("test", OUT_OF_DOMAIN)  # domains of the mean of both
TEACHER = "teacher, one for the three languages"
MAIN = [method.label for method in GROUPS["main"]]


@dataclass
class Row:
    """A method's runs by language and fold, and by split the counts of their utterances."""

    label: str
    results: dict[str, dict[int, Result]] = field(default_factory=dict)
    abilities: dict[str, dict[int, Abilities]] = field(default_factory=dict)
    prefix: str = ""  # of the teacher's evaluations: "{language} "

    def counts(self, language: str, split: str) -> Counts:
        key = self.prefix.format(language=language) + split
        return {fold: counts_of(run["evaluations"][key]) for fold, run in self.results.get(language, {}).items()}

    def rate(self, language: str, split: str, name: str) -> np.ndarray | None:
        counts = self.counts(language, split)
        return rate(counts, language, split, name) if counts else None

    def every(self) -> list[Result]:
        return [run for folds in self.results.values() for run in folds.values()]

    def folds(self, language: str) -> set[int]:
        return set(self.results.get(language, ()))

    @property
    def has_experts(self) -> bool:
        return self.every()[0]["settings"]["method"] in EXPERTS


def read_rows(grid: Grid) -> tuple[list[Row], list[str]]:
    """The rows with results, and what is missing."""
    rows, missing = [], []
    abilities = AbilityTable(grid.store).read()
    for method in METHODS:
        try:
            tuned = grid.tuned(method)
        except ValueError:
            missing.append(f"{method.label}: tuning")
            continue
        row, absent = Row(method.label), []
        for language in LANGUAGES:
            for fold in range(FOLDS):
                run = grid.run(method, language, fold, tuned)
                result = grid.store.read(run)
                if result is not None and is_measured(result):
                    row.results.setdefault(language, {})[fold] = result
                    if key_of(run) in abilities:
                        row.abilities.setdefault(language, {})[fold] = abilities[key_of(run)]
                elif language in grid.languages_of(method):
                    absent.append(f"{language} {fold}")
        if absent:
            missing.append(f"{method.label}: {', '.join(absent) if row.results else 'all'}")
        if row.results:
            rows.append(row)
    teacher = Row(TEACHER, prefix="{language} ")
    for fold in range(FOLDS):
        result = grid.store.read(teacher_run(grid.max_steps, fold))
        if result is not None:
            for language in grid.languages:
                teacher.results.setdefault(language, {})[fold] = result
    return rows + [teacher] * bool(teacher.results), missing


def common_languages(measured: dict[str, Sequence[str]]) -> list[str]:
    """
    The languages that means are over: those of all methods of the group main, so that means can be compared.

    Args:
        measured (`dict[str, Sequence[str]]`): The languages of each label; those without any do not count.
    """
    main = [set(languages) for label, languages in measured.items() if label in MAIN and languages]
    common = set.intersection(*main) if main else set()
    return [language for language in LANGUAGES if language in common]


def mean(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The mean of draws, `None` if one is missing."""
    return None if not parts or any(part is None for part in parts) else np.mean(parts, axis=0)


def language_name(language: str) -> str:
    return langcodes.get(language).display_name()
