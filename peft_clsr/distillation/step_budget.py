"""The gate budget of a whole optimizer step, over micro-batches, languages and processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator


class StepBudget:
    """
    Computes the share of a batch in the budget loss of its optimizer step.

    The budget loss of an adapter is `|S/N - b|`, with S the sum of its gate values and N the number of its routed
    tokens over the whole step. If the sign of `S/N - b` is known, this is linear: `±(S - bN)/N`. So the shares of
    micro-batches, languages and processes add up exactly. With several micro-batches, count the gates of all of them
    before the first backward pass, and pass the counts to `start_step`.

    Gate counts are float32 [2, adapters]: sums of gate values, and numbers of routed tokens.

    Args:
        tuner ([`CLSRModel`]): The student's tuner.
        accelerator (`Accelerator`): The trainer's.
        across_processes (`bool`): Add counts over processes.
    """

    def __init__(self, tuner: Any, accelerator: Accelerator, across_processes: bool) -> None:
        self.tuner, self.accelerator, self.across_processes = tuner, accelerator, across_processes
        self.step_counts: torch.Tensor | None = None  # of the running step, if it has several micro-batches

    @property
    def is_counted(self) -> bool:
        """True if the gates of the running step were counted beforehand."""
        return self.step_counts is not None

    def start_step(self, counts: torch.Tensor) -> None:
        """Set the counts of all micro-batches of the step on this process."""
        self.step_counts = self._over_processes(counts)

    def end_step(self) -> None:
        self.step_counts = None

    def counts_of_last_forward(self, adapter_names: list[str]) -> torch.Tensor:
        """The gate counts of the last forward, whose samples have these adapters; with its graph in training."""
        adapters, routing = list(self.tuner.peft_config), self.tuner.routing
        if routing.gate_sums is None:
            return torch.zeros(2, len(adapters), device=self.accelerator.device)
        by_sample = torch.stack([routing.gate_sums, routing.gate_counts])  # [2, batch]
        index = torch.tensor([adapters.index(name) for name in adapter_names], device=by_sample.device)
        return by_sample.new_zeros(2, len(adapters)).index_add(1, index, by_sample)

    def weighted_loss(self, counts: torch.Tensor, is_step: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The share of a batch in the budget loss of its step.

        Args:
            counts (`torch.Tensor`): [2, adapters], of the batch.
            is_step (`bool`): True if the batch is a part of an optimizer step, `False` if it stands alone.

        Returns:
            `tuple` of two scalars: the loss times each adapter's `budget_weight`, with the graph of `counts`, and the
            loss without weights.
        """
        if not is_step:
            step_counts = counts.detach()
        elif self.step_counts is not None:
            step_counts = self.step_counts
        else:
            step_counts = self._over_processes(counts.detach())
        losses = self.losses(counts, step_counts)
        return (self.config_values("budget_weight", losses) * losses).sum(), losses.detach().sum()

    def losses(self, counts: torch.Tensor, step_counts: torch.Tensor) -> torch.Tensor:
        """
        Each adapter's share, weighted by its share of the routed tokens of the step.

        Args:
            counts (`torch.Tensor`): [2, adapters], of the batch.
            step_counts (`torch.Tensor`): [2, adapters], of all batches of the step, on all processes.

        Returns:
            `torch.Tensor`: [adapters], with the graph of `counts`.
        """
        budgets = self.config_values("gate_budget", counts)
        sums, tokens = step_counts
        signs = (sums / tokens.clamp(min=1) - budgets).sign()
        return signs * (counts[0] - budgets * counts[1]) / tokens.sum().clamp(min=1)

    def config_values(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A field of each adapter's config, [adapters], with dtype and device of `like`."""
        return like.new_tensor([getattr(config, name) for config in self.tuner.peft_config.values()])

    def _over_processes(self, counts: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(counts, "sum") if self.across_processes else counts
