"""The grid of the second round: methods, what tuning tries, and which runs come first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.comparison.folds import FOLD_SETTINGS, FOLDS
from benchmarks.comparison.methods import (
    CLSR,
    EXPERT,
    FINETUNED,
    FULL,
    FULL_EXPERT,
    LORA,
    LORA_ATTENTION,
    METHOD_SETTINGS,
    ZERO_SHOT,
    Candidate,
)
from benchmarks.comparison.runs import Run, teacher_run
from benchmarks.comparison.selection import best_candidate
from benchmarks.comparison.store import ResultStore

GRID_LANGUAGES = ("ro", "be", "ru")  # with all methods; others as time allows
# Tuning is by WER in validation, mean over these, in this fold. Test recordings have no part in it.
TUNING_LANGUAGES, TUNING_FOLD = ("ro", "be"), 0
_LOW_RANK: list[Candidate] = [(1e-3, 32), (2e-3, 32), (4e-3, 32), (2e-3, 64)]
CANDIDATES: dict[str, list[Candidate]] = {
    FULL: [(1e-5, None), (2e-5, None), (5e-5, None)],
    LORA: _LOW_RANK,
    EXPERT: _LOW_RANK,
    LORA_ATTENTION: [(5e-4, 32), (1e-3, 32), (2e-3, 32), (1e-3, 64)],
    CLSR: [(1e-4, None), (2e-4, None), (5e-4, None)],
    FULL_EXPERT: [(1e-4, None), (2e-4, None), (5e-4, None)],
}


@dataclass(frozen=True)
class Method:
    """A row of the tables. Taught rows have the learning rate and rank of the untaught one."""

    name: str  # of `methods.METHODS`
    label: str
    taught: bool = False
    kd_decay: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of [`Run`] that differ from its defaults."""
        own = METHOD_SETTINGS.get(self.name, {}) | FOLD_SETTINGS
        return own | {"teacher": FINETUNED if self.taught else None, "kd_decay": self.kd_decay}


UNCHANGED = Method(ZERO_SHOT, "whisper, unchanged")
# The most telling groups first.
GROUPS: dict[str, list[Method]] = {
    "main": [
        UNCHANGED,
        Method(FULL, "full fine-tuning"),
        Method(LORA, "LoRA"),
        Method(EXPERT, "experts"),
    ],
    "kd": [
        Method(EXPERT, "experts + KD", taught=True),
        Method(EXPERT, "experts + KD that decays", taught=True, kd_decay=True),
    ],
    "more": [
        Method(LORA_ATTENTION, "LoRA, attention too"),
        Method(FULL_EXPERT, "full experts"),
        Method(CLSR, "full experts, the paper's gates"),
        Method(FULL_EXPERT, "full experts + KD", taught=True),
        Method(CLSR, "full experts, the paper's gates + KD", taught=True),
    ],
}
METHODS = [method for methods in GROUPS.values() for method in methods]


class Grid:
    """
    The runs of each group.

    Args:
        store (`ResultStore`): Has the results of tuning, which choose learning rates and ranks.
        languages (`Sequence[str]`): Languages.
        folds (`Sequence[int]`, *optional*): Folds.
        names (`Sequence[str]`, *optional*): Names of methods.
        max_steps (`int`, *optional*): Of each training; all by default.
    """

    def __init__(
        self,
        store: ResultStore,
        languages: Sequence[str] = GRID_LANGUAGES,
        folds: Sequence[int] = tuple(range(FOLDS)),
        names: Sequence[str] = (ZERO_SHOT, *CANDIDATES),
        max_steps: int = -1,
    ) -> None:
        self.store, self.languages, self.folds, self.max_steps = store, languages, folds, max_steps
        self.names = names

    def methods(self, group: str) -> list[Method]:
        """The methods of a group that are of the grid."""
        return [method for method in GROUPS[group] if method.name in self.names]

    def candidates(self, name: str) -> list[Run]:
        """The runs that try the candidates of a method."""
        settings = Method(name, "").settings | {"fold": TUNING_FOLD, "max_steps": self.max_steps}
        return [
            Run(name, language, learning_rate=learning_rate, rank=rank, **settings)
            for learning_rate, rank in CANDIDATES[name]
            for language in TUNING_LANGUAGES
        ]

    def tuning(self, group: str) -> list[Run]:
        """The tuning runs of a group."""
        names = dict.fromkeys(method.name for method in self.methods(group) if method != UNCHANGED)
        return [run for name in names for run in self.candidates(name)]

    def teachers(self, group: str) -> list[Run]:
        """The teachers of a group, one a fold."""
        if not any(method.taught for method in self.methods(group)):
            return []
        return [teacher_run(self.max_steps, fold) for fold in self.folds]

    def chosen(self, name: str) -> Candidate:
        """
        Learning rate and rank of the lowest WER in validation, mean over the tuning languages. Ties go to the first.

        Raises:
            ValueError: a tuning run has no results.
        """
        rates: dict[Candidate, dict[str, float]] = {}
        for run in self.candidates(name):
            results = self.store.read(run)
            if results is None:
                raise ValueError(f"{run.name} has no results in {self.store.table_dir}: run its group again")
            rate = results["evaluations"]["validation"]["wer"]
            rates.setdefault((run.learning_rate, run.rank), {})[run.language] = rate
        return best_candidate(rates, TUNING_LANGUAGES)

    def runs(self, group: str) -> list[Run]:
        """The runs of a group as tuned. All methods and languages of a fold come before the next fold."""
        methods = self.methods(group)
        choices = {method.name: self.chosen(method.name) for method in methods if method != UNCHANGED}
        return [
            self.run(method, language, fold, choices.get(method.name, (None, None)))
            for fold in self.folds
            for language in self.languages
            for method in methods
        ]

    def run(self, method: Method, language: str, fold: int, choice: Candidate) -> Run:
        """A run of a method with a learning rate and rank."""
        learning_rate, rank = choice
        settings = method.settings | {"fold": fold, "max_steps": self.max_steps}
        return Run(method.name, language, learning_rate=learning_rate, rank=rank, **settings)
