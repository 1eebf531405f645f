"""Callbacks: the gate-noise schedule, and the epoch for samplers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class GateScheduleCallback(TrainerCallback):
    """
    Sets the progress of the gate noise in each step. The noise rises linearly from 0 to `gate_noise` over training.
    For straight-through gates it falls from `gate_noise` to 0 in the first half.

    [`DistillationTrainer`] adds this callback itself. For a plain `Seq2SeqTrainer`, pass
    `callbacks=[GateScheduleCallback()]`. A resumed run continues the schedule.

    Raises:
        TypeError: the model has no CLSR adapter.
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        tuner = getattr(model, "base_model", None)
        if not hasattr(tuner, "set_gate_progress"):
            raise TypeError(
                f"GateScheduleCallback expects a PeftModel with a CLSR adapter, not a {type(model).__name__}: wrap "
                "the model with get_peft_model(model, CLSRConfig(...))"
            )
        tuner.set_gate_progress(min(state.global_step / max(state.max_steps, 1), 1.0))


class EpochCallback(TrainerCallback):
    """
    Sets the epoch of a sampler or an iterable dataset at the start of each epoch.

    `Trainer` does this only for some of accelerate's wrappers around a sampler. They depend on the number of processes
    and differ after a resume in the middle of an epoch.

    Args:
        sampler: Has `set_epoch(epoch)`.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))
