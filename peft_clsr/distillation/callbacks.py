"""Callbacks: the gate-noise schedule, and the epoch for samplers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..tuner.progress import set_gate_progress


class GateScheduleCallback(TrainerCallback):
    """
    Schedules the noise on gate logits. It rises linearly from 0 to `gate_noise` over training. With straight-through
    gates, it falls from `gate_noise` to 0 in the first half.

    [`DistillationTrainer`] adds it by itself; a plain `Seq2SeqTrainer` needs `callbacks=[GateScheduleCallback()]`. A
    resumed run continues the schedule.

    Raises:
        TypeError: the model has no CLSR adapter.
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        set_gate_progress(model, min(state.global_step / max(state.max_steps, 1), 1.0))


class EpochCallback(TrainerCallback):
    """
    Sets the epoch of a sampler (or an iterable dataset) when an epoch begins.

    `Trainer` does not reach the sampler through every wrapper that accelerate puts around it. The wrapper depends on
    the number of processes, and on whether the run was resumed in the middle of an epoch.

    Args:
        sampler: An object with `set_epoch(epoch)`.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))
