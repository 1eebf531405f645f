"""The grid: which runs each group has."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from .methods import (
    BASE,
    CANDIDATES,
    CLSR,
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
)
from .runs import Run
from .selection import best_candidate
from .speech import AUDIO_SECONDS, FULL_CONTEXT
from .store import ResultStore

# Changes of settings by group, each tried alone.
CHANGES: dict[str, list[dict[str, Any]]] = {
    "gate": [{"skip_gate_prob": 0.2}, {"gate_noise": 0.0}, {"expert_dropout": 0.3}],
    "budget": [{"gate_budget": 0.25}, {"gate_budget": 0.5}, {"gate_budget": 1.0}, {"budget_weight": 0.0}],
    "kd": [{"teacher": BASE}, {"kd_loss": "kl"}, {"kd_weight": 0.5}, {"kd_weight": 8.0}],
    "rank": [
        {"rank": 8},
        {"rank": 32},
        *({"rank": None, "learning_rate": learning_rate} for learning_rate in (1e-4, 2e-4, 4e-4)),
    ],
}
TRAINED_GROUPS = ("tuning", "main", *CHANGES, "size", "student")
TRAIN_SIZES = (100, 200)  # beside the default
DECODER_LAYERS = 3  # of the smaller student


class Grid:
    """
    The runs of each group.

    Args:
        store (`ResultStore`): Has the results of tuning, which choose the learning rates of the other groups.
        teacher (`str`): Teacher of the runs that are taught.
        languages (`list[str]`): Languages of the group "main".
        seeds (`list[int]`): Seeds of all groups but "tuning".
        methods (`Collection[str]`, *optional*): Methods of "tuning", "main" and the groups that measure runs again.
        settings: Settings that all runs share.
    """

    def __init__(
        self,
        store: ResultStore,
        teacher: str,
        languages: list[str],
        seeds: list[int],
        methods: Collection[str] = tuple(CANDIDATES),
        **settings: Any,
    ) -> None:
        self.store, self.teacher, self.languages, self.seeds = store, teacher, languages, seeds
        self.settings = settings
        alone = [(method, None) for method in (FULL, LORA, CLSR, STRAIGHT)]
        taught = [(method, teacher) for method in (CLSR, LOW_RANK, STRAIGHT)]
        self.methods = [(method, teacher) for method, teacher in alone + taught if method in methods]

    def tuning(self, method: str, teacher: str | None) -> list[Run]:
        """The runs that try the candidates of a method."""
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
            ValueError: a tuning run has no results.
        """
        runs = self.tuning(method, teacher)
        rates: dict[Candidate, dict[str, float]] = {(run.learning_rate, run.rank): {} for run in runs}
        for run in runs:
            results = self.store.read(run)
            if results is None:
                raise ValueError(f"{run.name} has no results in {self.store.table_dir}: run the group 'tuning' first")
            rates[run.learning_rate, run.rank][run.language] = results["evaluations"]["validation"]["wer"]
        learning_rate, rank = best_candidate(rates)
        return replace(runs[0], language=STUDIED_LANGUAGE, learning_rate=learning_rate, rank=rank)

    def runs(self, group: str) -> list[Run]:
        """The runs of one of `TRAINED_GROUPS`. All but "tuning" need the results of tuning."""
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

    def measured_again(self, group: str) -> list[Run]:
        """The main runs in the studied language that "untouched" or "gates" measures again."""
        runs = [replace(self.tuned(*method), seed=seed) for seed in self.seeds for method in self.methods]
        if group == "gates":
            return [run for run in runs if run.method in ROUTED]
        return [Run(ZERO_SHOT, STUDIED_LANGUAGE, audio_seconds=FULL_CONTEXT, **self.settings), *runs]
