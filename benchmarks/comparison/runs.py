"""A run of the comparison: its settings, its name and its key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .folds import FOLD_SETTINGS
from .methods import ALL_LANGUAGES, FULL, LORA, METHOD_SETTINGS
from .speech import AUDIO_SECONDS


@dataclass(frozen=True)
class Run:
    """
    The settings that decide a run's results.

    Most are those of `DistillationTrainingArguments`, `CLSRConfig` and `LoraConfig`. Defaults are of the first round;
    `folds.FOLD_SETTINGS` has those that the second round shares.
    """

    method: str
    language: str
    seed: int = 0
    teacher: str | None = None
    learning_rate: float | None = None
    rank: int | None = None
    train_size: int | None = 400  # utterances; all if None
    epochs: int = 3
    batch_size: int = 8
    audio_seconds: float = AUDIO_SECONDS
    label_smoothing: float = 0.1
    kd_loss: str = "js"
    kd_weight: float = 2.0
    gate_budget: float = 0.5
    budget_weight: float = 1.0
    skip_gate_prob: float = 0.2
    gate_noise: float = 5.0
    expert_dropout: float = 0.3
    straight_through: bool = False
    decoder_layers: int | None = None  # layers of the student's decoder to keep; all by default
    max_steps: int = -1
    fold: int = -1  # of the second round: packed windows, all of the other folds; -1: the splits of the first round
    kd_decay: bool = False  # the weight of the distillation falls to 0
    spec_augment: bool = False
    scale: float = 1.0  # share of what was trained that is kept, as of `peft_clsr.scale_expert`
    train_from: int = 0  # utterances that are left out before those of `train_size`

    @property
    def name(self) -> str:
        """The run in words, for messages; see `run_name`."""
        return run_name(asdict(self))

    @property
    def key(self) -> str:
        """The name of the run's folder, such as "ro_lora_seed0_1a2b3c4d"; see `settings_hash`."""
        return f"{self.language}_{self.method}_seed{self.seed}_{settings_hash(asdict(self))}"


def run_name(settings: Mapping[str, Any]) -> str:
    """Language, method, teacher, seed, and the settings that differ from the defaults of the method and the round."""
    defaults = METHOD_SETTINGS.get(settings["method"], {}) | (FOLD_SETTINGS if settings.get("fold", -1) >= 0 else {})
    parts = [settings["language"], settings["method"], f"seed{settings['seed']}"]
    if settings["teacher"] is not None:
        parts.insert(2, f"kd-{settings['teacher'].replace('/', '--')}")  # a Hub id, written as in the Hub's cache
    for item in fields(Run)[4:]:
        value = settings.get(item.name, item.default)
        if value != defaults.get(item.name, item.default):
            parts.append(f"{item.name}={value:g}" if isinstance(value, float) else f"{item.name}={value}")
    return "_".join(parts)


def settings_hash(settings: Mapping[str, Any]) -> str:
    """
    A hash of all settings but method, language and seed: 8 hexadecimal digits.

    Settings with the default of `Run` do not count, so that a new setting leaves the hashes of old runs as they are.
    """
    defaults = {item.name: item.default for item in fields(Run)[3:]}
    changed = {name: settings[name] for name in defaults if settings.get(name, defaults[name]) != defaults[name]}
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]


def teacher_run(max_steps: int = -1, fold: int = -1) -> Run:
    """The run that trains the teacher "finetuned", of the first round or of a fold of the second."""
    run = Run(FULL, ALL_LANGUAGES, learning_rate=5e-5, max_steps=max_steps)
    if fold < 0:
        return run
    return replace(run, fold=fold, **FOLD_SETTINGS | {"epochs": 6, "batch_size": 2, "spec_augment": True})


def held_out_teacher(run: Run) -> Run:
    """
    The run that trains the teacher "held-out": LoRA, on all recordings of the student's language but the student's.

    Args:
        run (`Run`): The student. Its `train_size` recordings are left out.

    Returns:
        `Run`: with the learning rate and rank that the second round's tuning chose for LoRA.

    Raises:
        ValueError: the student is trained on all recordings.
    """
    if run.train_size is None:
        raise ValueError(f"{run.name} is trained on all recordings, so none are left for its teacher: set train_size")
    return Run(
        LORA,
        run.language,
        learning_rate=2e-3,
        rank=32,
        fold=run.fold,
        max_steps=run.max_steps,
        train_from=run.train_size,
        **FOLD_SETTINGS,
    )
