"""The grid of the second round: methods, what tuning tries, and which runs come first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from benchmarks.comparison.folds import FOLD_SETTINGS, FOLDS, GRID_LANGUAGES, HUMAN
from benchmarks.comparison.methods import (
    CLSR,
    EXPERT,
    FINETUNED,
    FULL,
    FULL_EXPERT,
    LORA,
    METHOD_SETTINGS,
    STRAIGHT,
    ZERO_SHOT,
)
from benchmarks.comparison.runs import Run, teacher_run
from benchmarks.comparison.store import ResultStore

# Tuning is by WER in validation, mean over these, in this fold. Test recordings have no part in it.
TUNING_LANGUAGES, TUNING_FOLD = ("ro", "be"), 0
# The best candidates are compared in one more language: validation in two does not tell close ones apart.
FINALISTS, FINAL_LANGUAGE = 3, "ru"
Settings = dict[str, Any]  # of `Run`


def _candidates(*pairs: tuple[float, int | None]) -> list[Settings]:
    return [{"learning_rate": learning_rate, "rank": rank} for learning_rate, rank in pairs]


# Gates that are held open, so that all tokens train the expert, and nothing is dropped: almost a LoRA.
HELD_OPEN = {"budget_weight": 1.0, "expert_dropout": 0.0}
_LOW_RANK = _candidates((1e-3, 32), (2e-3, 32), (4e-3, 32), (2e-3, 64))
CANDIDATES: dict[str, list[Settings]] = {
    FULL: _candidates((1e-5, None), (2e-5, None), (5e-5, None), (1e-4, None), (2e-4, None)),
    LORA: _LOW_RANK,
    EXPERT: [*_LOW_RANK, {"learning_rate": 2e-3, "rank": 32, **HELD_OPEN}],
}
# A method that is not tuned on its own takes the learning rate and rank of another one.
TUNED_AS = {STRAIGHT: EXPERT}
# Nor are full experts: these are of the first round, whose tuning chose them for the paper's gates.
FULL_SIZE: Settings = {"learning_rate": 2e-4, "rank": None}

# The share of what was trained that is kept (`Run.scale`). Not tuned: validation is of the domain of the training.
HALF = 0.5

# How strong the teacher is: weight of the distillation, and if it falls to 0 over the training.
DISTILLATIONS: list[Settings] = [
    {"kd_weight": 2.0, "kd_decay": False},
    {"kd_weight": 8.0, "kd_decay": False},
    {"kd_weight": 8.0, "kd_decay": True},
]


@dataclass(frozen=True)
class Method:
    """A row of the tables. Taught rows have the learning rate and rank of the untaught one."""

    name: str  # of `methods.METHODS`
    label: str
    taught: bool = False
    fixed: Settings | None = None  # in place of the learning rate and rank that tuning chooses
    scale: float = 1.0  # of `Run`
    languages: tuple[str, ...] | None = None  # None: all of the grid

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of [`Run`] that differ from its defaults, without what tuning chooses."""
        own = METHOD_SETTINGS.get(self.name, {}) | FOLD_SETTINGS
        return own | {"teacher": FINETUNED if self.taught else None, "scale": self.scale}


UNCHANGED = Method(ZERO_SHOT, "whisper, unchanged")
# The distillation is tuned on these.
TAUGHT_EXPERTS = Method(EXPERT, "taught experts", taught=True)
# The most telling groups first.
GROUPS: dict[str, list[Method]] = {
    "main": [
        UNCHANGED,
        Method(FULL, "full fine-tuning"),
        Method(LORA, "LoRA"),
        Method(EXPERT, "experts"),
    ],
    "half": [
        Method(FULL, "full fine-tuning, half", scale=HALF, languages=(HUMAN,)),
        Method(LORA, "LoRA, half", scale=HALF, languages=(HUMAN,)),
        Method(EXPERT, "experts, half", scale=HALF, languages=(HUMAN,)),
    ],
    "kd": [TAUGHT_EXPERTS],
    "gates": [
        Method(EXPERT, "experts, gates that may close", fixed=_LOW_RANK[-1]),
        Method(STRAIGHT, "experts, noise that falls"),
    ],
    "full-size": [
        Method(FULL_EXPERT, "full experts", fixed=FULL_SIZE | HELD_OPEN, languages=(HUMAN,)),
        Method(CLSR, "full experts, the paper's gates", fixed=FULL_SIZE, languages=(HUMAN,)),
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
        max_steps (`int`, *optional*): Of each training, for a trial, which has the first candidate alone.
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

    def languages_of(self, method: Method) -> list[str]:
        """The languages of the grid that a method is run in."""
        return [each for each in self.languages if method.languages is None or each in method.languages]

    def candidates(self, name: str) -> list[Run]:
        """The runs that try the candidates of a method, or of the one that it is tuned as."""
        tried = TUNED_AS.get(name, name)
        candidates = CANDIDATES[tried] if self.max_steps < 0 else CANDIDATES[tried][:1]
        return [
            self.run(Method(tried, ""), language, TUNING_FOLD, settings)
            for settings in candidates
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
            self.run(TAUGHT_EXPERTS, language, TUNING_FOLD, tuned | distillation)
            for distillation in DISTILLATIONS
            for language in TUNING_LANGUAGES
        ]

    def is_taught(self, group: str) -> bool:
        """True if a method of the group has a teacher."""
        return any(method.taught for method in self.methods(group))

    def tuned_names(self, group: str) -> list[str]:
        """The methods of a group whose learning rates and ranks are chosen."""
        names = [method.name for method in self.methods(group) if method != UNCHANGED and method.fixed is None]
        return [*dict.fromkeys(names + [EXPERT] * self.is_taught(group))]

    def tuning(self, group: str) -> list[Run]:
        """The runs that choose the learning rates and ranks of a group."""
        return [run for name in self.tuned_names(group) for run in self.candidates(name)]

    def finals(self, group: str) -> list[Run]:
        """The runs of the best candidates of `tuning` in the final language."""
        return [run for name in self.tuned_names(group) for run in self._finals(self.candidates(name))]

    def taught_tuning(self, group: str) -> list[Run]:
        """The runs that choose the distillation of a group; see `taught_candidates`."""
        return self.taught_candidates() if self.is_taught(group) else []

    def teachers(self, group: str) -> list[Run]:
        """The teachers of a group's runs, one a fold."""
        return [teacher_run(self.max_steps, fold) for fold in self.folds] if self.is_taught(group) else []

    def teacher(self, run: Run) -> Run:
        """The teacher of a run."""
        return teacher_run(self.max_steps, run.fold)

    def chosen(self, name: str) -> Settings:
        """
        The candidate of the lowest WER in validation. Ties go to the first.

        The mean over the tuning languages chooses the finalists, and that over these and the final language the best.

        Raises:
            ValueError: a tuning run has no results.
        """
        runs = self.candidates(name)
        finals = self._finals(runs)
        compared = [*(run for run in runs if replace(run, language=FINAL_LANGUAGE) in finals), *finals]
        return self._best(compared, runs, CANDIDATES[TUNED_AS.get(name, name)])

    def chosen_distillation(self) -> Settings:
        """
        The candidate of the lowest WER in validation, mean over the tuning languages. Ties go to the first.

        Raises:
            ValueError: a tuning run has no results.
        """
        runs = self.taught_candidates()
        return self._best(runs, runs, DISTILLATIONS)

    def _finals(self, runs: Sequence[Run]) -> list[Run]:
        return [replace(run, language=FINAL_LANGUAGE) for run in self._ranked(runs)[:FINALISTS]]

    def _best(self, compared: Sequence[Run], runs: Sequence[Run], candidates: Sequence[Settings]) -> Settings:
        """The candidate whose runs are the best of those compared. `runs` has those of the first candidate first."""
        best = self._ranked(compared)[0]
        return dict(zip(runs[:: len(TUNING_LANGUAGES)], candidates, strict=False))[best]  # a trial has fewer runs

    def _ranked(self, runs: Sequence[Run]) -> list[Run]:
        """The run of each candidate in the first language, by the mean WER in validation over languages."""
        rates: dict[Run, list[float]] = {}
        for run in runs:
            rate = self.validation(run)
            if rate is None:
                raise ValueError(f"{run.name} has no results in {self.store.table_dir}: run its group again")
            rates.setdefault(replace(run, language=TUNING_LANGUAGES[0]), []).append(rate)
        return sorted(rates, key=lambda candidate: mean(rates[candidate]))

    def validation(self, run: Run) -> float | None:
        """The WER of a run in validation, `None` if it was not measured."""
        results = self.store.read(run)
        evaluation = results and results["evaluations"].get("validation")
        return evaluation["wer"] if evaluation else None

    def tuned(self, method: Method) -> dict[str, Any]:
        """
        The settings that tuning chose for a row.

        Raises:
            ValueError: a tuning run has no results.
        """
        if method == UNCHANGED:
            return {}
        tuned = self.chosen(method.name) if method.fixed is None else method.fixed
        if method.name in TUNED_AS:
            tuned = {name: tuned[name] for name in ("learning_rate", "rank")}
        return tuned | (self.chosen_distillation() if method.taught else {})

    def runs(self, group: str) -> list[Run]:
        """The runs of a group as tuned. All methods and languages of a fold come before the next fold."""
        tuned = [(method, self.tuned(method)) for method in self.methods(group)]
        return [
            self.run(method, language, fold, settings)
            for fold in self.folds
            for language in self.languages
            for method, settings in tuned
            if language in self.languages_of(method)
        ]

    def run(self, method: Method, language: str, fold: int, tuned: Mapping[str, Any]) -> Run:
        """A run of a method, with settings as of `tuned`."""
        return Run(method.name, language, **method.settings | tuned, fold=fold, max_steps=self.max_steps)
