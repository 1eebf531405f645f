"""Stops a training before an optimizer step whose batches, teacher, student, losses or gradients are not finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator

from .losses import TeacherTargets

_REMEDIES = {
    "input features": "look at the recording, and prepare it again",
    "teacher's input features": "look at the recording, and prepare it again with the teacher's processor",
    "teacher's decoder states": "load the teacher in float32 or bfloat16, as float16 overflows, or drop the example",
    "student's decoder states": "lower the learning rate, and train in float32 or bfloat16, not in float16",
    "cross-entropy": "look at the student's output layer, and train in float32 or bfloat16, not in float16",
    "distillation loss": "look at the teacher's output layer, and load the teacher in float32 or bfloat16",
    "budget loss": "lower the learning rate, and train in float32 or bfloat16, not in float16",
}


class NotFiniteError(ValueError):
    """A training step was not made, because it would have made weights NaN or infinite."""


class FiniteChecks:
    """
    Collects, for each micro-batch of an optimizer step, what is finite. Reads it once, before the optimizer's step.

    Flags are boolean tensors by name, in the order of cause and effect: `[batch]`, or scalars of the whole batch.

    Args:
        accelerator (`Accelerator`): Reaches the other processes: all of them stop.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.flags: dict[str, torch.Tensor] = {}  # of the running micro-batch
        self._batches: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []  # flags and labels

    def end_batch(self, labels: torch.Tensor) -> None:
        """Keep the flags of a micro-batch with its labels [batch, tokens]."""
        self._batches.append((self.flags, labels))
        self.flags = {}

    def end_step(self, step: int, describe: Callable[[torch.Tensor], str]) -> None:
        """
        Check the step that ends, with one device sync.

        Args:
            step (`int`): The number of optimizer steps that were made.
            describe (`Callable`): Describes an example, given its labels [tokens].

        Raises:
            NotFiniteError: on every process, if anything was not finite on any of them.
        """
        batches, self._batches = self._batches, []
        all_flags = [flag for flags, _ in batches for flag in flags.values()]
        device = self.accelerator.device
        is_broken = torch.stack([~flag.all().to(device) for flag in all_flags]).any()
        if not self.accelerator.reduce(is_broken.float(), "sum").item():
            return
        kept = f"The optimizer step was not made: the weights are those after {step} steps."
        for index, (flags, labels) in enumerate(batches):
            for name, flag in flags.items():
                if flag.all():
                    continue
                where = f"batch {index + 1} of {len(batches)} in step {step + 1}"
                if flag.dim():
                    rows = (~flag).nonzero().flatten().tolist()
                    numbers = ", ".join(str(row + 1) for row in rows)
                    where = f"example{'s' * (len(rows) > 1)} {numbers} of {len(flag)} in {where}"
                    where += f" ({describe(labels[rows[0]])})"
                raise NotFiniteError(f"NaN or infinite values in the {name} of {where}: {_REMEDIES[name]}. {kept}")
        raise NotFiniteError(f"NaN or infinite values on another process in step {step + 1}. {kept}")

    def check_gradients(self, norm: torch.Tensor | float | None, step: int, is_step_made: bool) -> None:
        """
        Raise a `NotFiniteError` if the norm of the gradients is not finite, on all processes alike.

        DeepSpeed tells the norm when the optimizer's step is made: the weights are then lost.

        With a `GradScaler` (float16) it may be infinite: the scaler then skips the step, and scales less.
        """
        if norm is None or self.accelerator.scaler is not None or torch.as_tensor(norm).isfinite():
            return
        kept = f"The optimizer step was not made: the weights are those after {step} steps."
        lost = "DeepSpeed made the optimizer step: resume from the last checkpoint."
        raise NotFiniteError(
            f"NaN or infinite values in the gradients of step {step + 1}: lower the learning rate, and train in "
            f"float32 or bfloat16. {lost if is_step_made else kept}"
        )


def finite_examples(tensor: torch.Tensor) -> torch.Tensor:
    """True for each example [batch] of a tensor [batch, ...] whose values are all finite."""
    return tensor.isfinite().flatten(1).all(dim=1)


def finite_states(hidden_states: torch.Tensor, is_label: torch.Tensor) -> torch.Tensor:
    """True for each example [batch] whose decoder states [batch, tokens, hidden] are finite at its labels."""
    return (hidden_states.isfinite().all(dim=-1) | ~is_label).all(dim=-1)


def finite_targets(targets: TeacherTargets, is_label: torch.Tensor) -> torch.Tensor:
    """True for each example [batch] whose teacher states are finite where used; `is_label` is [batch, tokens]."""
    is_finite = targets.hidden_states.isfinite().all(dim=-1)
    if targets.mask is not None:
        is_finite = is_finite | ~targets.mask
    return torch.ones_like(is_label).masked_scatter(is_label, is_finite).all(dim=-1)  # without a device sync
