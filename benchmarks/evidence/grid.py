"""The grid of the second round: methods, what tuning tries, and which runs come first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.comparison.folds import FOLD_SETTINGS, FOLDS, GRID_LANGUAGES
from benchmarks.comparison.methods import (
    CLSR,
    EXPERT,
    FINETUNED,
    FULL,
    FULL_EXPERT,
    LORA,
    LORA_ATTENTION,
    METHOD_SETTINGS,
    STRAIGHT,
    ZERO_SHOT,
    Candidate,
)
from benchmarks.comparison.runs import Run
from benchmarks.comparison.selection import best_candidate
from benchmarks.comparison.store import ResultStore

# Tuning is by WER in validation, mean over these, in this fold. Test recordings have no part in it.
TUNING_LANGUAGES, TUNING_FOLD = ("ro", "be"), 0
_LOW_RANK: list[Candidate] = [(1e-3, 32), (2e-3, 32), (4e-3, 32), (2e-3, 64)]
CANDIDATES: dict[str, list[Candidate]] = {
    FULL: [(1e-5, None), (2e-5, None), (5e-5, None), (1e-4, None), (2e-4, None)],
    LORA: _LOW_RANK,
    EXPERT: _LOW_RANK,
    LORA_ATTENTION: [(5e-4, 32), (1e-3, 32), (2e-3, 32), (1e-3, 64)],
    CLSR: [(1e-4, None), (2e-4, None), (5e-4, None)],
    FULL_EXPERT: [(1e-4, None), (2e-4, None), (5e-4, None)],
}
# A method that is not tuned on its own takes the learning rate and rank of another one.
TUNED_AS = {STRAIGHT: EXPERT}

# How strong the teacher is: weight of the distillation, and True if it falls to 0 over the training.
Distillation = tuple[float, bool]
DISTILLATIONS: list[Distillation] = [(2.0, False), (8.0, False), (8.0, True)]


@dataclass(frozen=True)
class Method:
    """A row of the tables. Taught rows have the learning rate and rank of the untaught one."""

    name: str  # of `methods.METHODS`
    label: str
    taught: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of [`Run`] that differ from its defaults, without what tuning chooses."""
        own = METHOD_SETTINGS.get(self.name, {}) | FOLD_SETTINGS
        return own | {"teacher": FINETUNED if self.taught else None}


UNCHANGED = Method(ZERO_SHOT, "whisper, unchanged")
# The distillation is tuned on these, for all taught rows.
TAUGHT_EXPERTS = Method(EXPERT, "taught experts", taught=True)
# The most telling groups first.
GROUPS: dict[str, list[Method]] = {
    "main": [
        UNCHANGED,
        Method(FULL, "full fine-tuning"),
        Method(LORA, "LoRA"),
        Method(EXPERT, "experts"),
    ],
    "kd": [TAUGHT_EXPERTS],
    "gates": [Method(STRAIGHT, "experts, noise that falls")],
    "more": [
        Method(LORA_ATTENTION, "LoRA, attention too"),
        Method(FULL_EXPERT, "full experts"),
        Method(CLSR, "full experts, the paper's gates"),
        Method(FULL_EXPERT, "taught full experts", taught=True),
        Method(CLSR, "taught full experts, the paper's gates", taught=True),
    ],
}
METHODS = [method for methods in GROUPS.values() for method in methods]
NAMES = tuple(dict.fromkeys(method.name for method in METHODS))


class Grid:
    """
    The runs of each group.

    Args:
        store (`ResultStore`): Has the results of tuning, which choose learning rates, ranks and the distillation.
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
        names: Sequence[str] = NAMES,
        max_steps: int = -1,
    ) -> None:
        self.store, self.languages, self.folds, self.max_steps = store, languages, folds, max_steps
        self.names = names

    def methods(self, group: str) -> list[Method]:
        """The methods of a group that are of the grid."""
        return [method for method in GROUPS[group] if method.name in self.names]

    def candidates(self, name: str) -> list[Run]:
        """The runs that try the candidates of a method, or of the one that it is tuned as."""
        tried = TUNED_AS.get(name, name)
        return [
            self.run(Method(tried, ""), language, TUNING_FOLD, {"learning_rate": learning_rate, "rank": rank})
            for learning_rate, rank in CANDIDATES[tried]
            for language in TUNING_LANGUAGES
        ]

    def taught_candidates(self) -> list[Run]:
        """
        The runs that try the candidates of the distillation.

        Raises:
            ValueError: see `chosen`.
        """
        tuned = self.tuned(Method(EXPERT, ""))
        return [
            self.run(TAUGHT_EXPERTS, language, TUNING_FOLD, tuned | {"kd_weight": weight, "kd_decay": decays})
            for weight, decays in DISTILLATIONS
            for language in TUNING_LANGUAGES
        ]

    def is_taught(self, group: str) -> bool:
        """True if a method of the group has a teacher."""
        return any(method.taught for method in self.methods(group))

    def tuning(self, group: str) -> list[Run]:
        """The runs that choose the learning rates and ranks of a group."""
        names = [method.name for method in self.methods(group) if method != UNCHANGED]
        names += [EXPERT] * self.is_taught(group)
        return [run for name in dict.fromkeys(names) for run in self.candidates(name)]

    def taught_tuning(self, group: str) -> list[Run]:
        """The runs that choose the distillation of a group; see `taught_candidates`."""
        return self.taught_candidates() if self.is_taught(group) else []

    def chosen(self, name: str) -> Candidate:
        """
        Learning rate and rank of the lowest WER in validation, mean over the tuning languages. Ties go to the first.

        Raises:
            ValueError: a tuning run has no results.
        """
        return self._best({run: (run.learning_rate, run.rank) for run in self.candidates(name)})

    def chosen_distillation(self) -> Distillation:
        """The candidate of the lowest WER in validation, as `chosen`."""
        return self._best({run: (run.kd_weight, run.kd_decay) for run in self.taught_candidates()})

    def _best(self, candidates: Mapping[Run, Any]) -> Any:
        rates: dict[Any, dict[str, float]] = {}
        for run, candidate in candidates.items():
            results = self.store.read(run)
            if results is None:
                raise ValueError(f"{run.name} has no results in {self.store.table_dir}: run its group again")
            rates.setdefault(candidate, {})[run.language] = results["evaluations"]["validation"]["wer"]
        return best_candidate(rates, TUNING_LANGUAGES)

    def tuned(self, method: Method) -> dict[str, Any]:
        """
        The settings that tuning chose for a row.

        Raises:
            ValueError: a tuning run has no results.
        """
        if method == UNCHANGED:
            return {}
        tuned = dict(zip(("learning_rate", "rank"), self.chosen(method.name), strict=True))
        if method.taught:
            tuned |= zip(("kd_weight", "kd_decay"), self.chosen_distillation(), strict=True)
        return tuned

    def runs(self, group: str) -> list[Run]:
        """The runs of a group as tuned. All methods and languages of a fold come before the next fold."""
        tuned = [(method, self.tuned(method)) for method in self.methods(group)]
        return [
            self.run(method, language, fold, settings)
            for fold in self.folds
            for language in self.languages
            for method, settings in tuned
        ]

    def run(self, method: Method, language: str, fold: int, tuned: Mapping[str, Any]) -> Run:
        """A run of a method, with settings as of `tuned`."""
        return Run(method.name, language, **method.settings, **tuned, fold=fold, max_steps=self.max_steps)
