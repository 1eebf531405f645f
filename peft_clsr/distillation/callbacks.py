"""Callbacks: the gate-noise schedule, and the epoch for samplers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..tuner.progress import set_gate_progress


class GateScheduleCallback(TrainerCallback):
    """
    Schedules the noise on gate logits.

    It rises linearly from 0 to `gate_noise` over training. With straight-through gates, it falls from `gate_noise` to
    0 in the first half.

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
    Sets the epoch of a sampler, and of a dataset that draws its rows anew in each epoch, when an epoch begins.

    `Trainer` does not reach the sampler through every wrapper that accelerate puts around it. The wrapper depends on
    the number of processes, and on whether the run was resumed in the middle of an epoch.

    Args:
        sources: Objects with `set_epoch(epoch)`. Those without it are left out.

    Raises:
        ValueError: the training has more epochs than a source with `num_epochs`.
    """

    def __init__(self, *sources: Any) -> None:
        self.sources = [source for source in sources if hasattr(source, "set_epoch")]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for source in self.sources:
            num_epochs = getattr(source, "num_epochs", state.num_train_epochs)
            if num_epochs < state.num_train_epochs:
                raise ValueError(
                    f"the teacher's states are cached for {num_epochs} epochs, and the training has "
                    f"{state.num_train_epochs}: cache as many (epochs=) in another cache_dir, or train no longer"
                )

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for source in self.sources:
            source.set_epoch(int(state.epoch or 0))
