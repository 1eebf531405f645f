"""What follows the course of training: the gate noise, and the order of the batches."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class GateScheduleCallback(TrainerCallback):
    """
    Lets the noise on gate logits rise linearly from 0 to `gate_noise` over training; that of straight-through gates
    fall from `gate_noise` to 0 in its first half.

    [`DistillationTrainer`] brings its own; a plain `Seq2SeqTrainer` takes `callbacks=[GateScheduleCallback()]`. A
    resumed run goes on where it was.

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
    Tells a sampler (or an iterable dataset) which epoch begins.

    `Trainer` does so by itself only for some of the wrappers that accelerate puts around a sampler, which differ by
    the number of processes and after a resume in the middle of an epoch.

    Args:
        sampler: Has `set_epoch(epoch)`.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))
