"""The gate budget of a whole optimizer step: all its batches, on all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel


class StepBudget:
    """
    Computes each batch's share in the budget loss of its optimizer step: `|mean(g) - gate_budget|` of each adapter,
    weighted by the adapter's share of the routed tokens.

    On one side of the budget the absolute value is linear, so the shares of batches add up exactly. The mean of the
    whole step decides the side. A step of several batches therefore needs `count` before its first backward pass.

    Gates are float32 tensors [2, adapters]: for each adapter the sum of its gate values and the number of its routed
    tokens. Adapters are in the order of `model.peft_config`.

    Args:
        model ([`~peft.PeftModel`]): The student.
        accelerator (`Accelerator`): Gives the device, and adds up over processes.
        over_processes (`bool`): True if a step spans all processes.
    """

    def __init__(self, model: PeftModel, accelerator: Accelerator, over_processes: bool) -> None:
        self.configs, self.routing = model.peft_config, model.base_model.routing
        self.accelerator, self.over_processes = accelerator, over_processes
        self.step_gates: torch.Tensor | None = None  # [2, adapters], of the running step, if it was counted

    @property
    def has_weight(self) -> bool:
        """True if the budget of any adapter is part of the loss."""
        return any(config.budget_weight for config in self.configs.values())

    def batch_gates(self, adapter_names: list[str]) -> torch.Tensor:
        """The gates of the last forward pass [2, adapters], with their graph; `adapter_names` has one per sample."""
        adapters = list(self.configs)
        of_samples = self.routing.forward_gates
        if of_samples.sums is None:
            return torch.zeros(2, len(adapters), device=self.accelerator.device)
        by_sample = torch.stack([of_samples.sums, of_samples.counts])  # [2, batch]
        index = torch.tensor([adapters.index(name) for name in adapter_names], device=by_sample.device)
        return by_sample.new_zeros(2, len(adapters)).index_add(1, index, by_sample)

    @torch.no_grad()
    def count(self, batches: list[dict[str, Any]], forward: Callable[[dict[str, Any]], list[str]]) -> None:
        """
        Count the gates of a step before its first backward pass. Random numbers are those that training will draw.

        Args:
            batches (`list[dict]`): All batches of the step on this process.
            forward (`Callable`): Runs the student on a batch and returns the adapter of each sample.
        """
        gates = torch.zeros((), device=self.accelerator.device)
        with _restored_random_state(self.accelerator.device):
            for batch in batches:
                gates = gates + self.batch_gates(forward(batch))
        self.step_gates = self._sum_over_processes(gates)

    def end_step(self) -> None:
        """Forget the gates that `count` found."""
        self.step_gates = None

    def losses(self, gates: torch.Tensor, is_whole_step: bool) -> torch.Tensor:
        """
        A batch's share in the budget loss of each adapter.

        Args:
            gates (`torch.Tensor`): [2, adapters], of the batch.
            is_whole_step (`bool`): True if no other batch or process counts, as in evaluation.

        Returns:
            `torch.Tensor`: [adapters], with the graph of `gates`.
        """
        if is_whole_step:
            step_gates = gates.detach()
        elif self.step_gates is not None:
            step_gates = self.step_gates
        else:
            step_gates = self._sum_over_processes(gates.detach())
        budgets = self._config_values("gate_budget", gates)
        step_sums, step_counts = step_gates
        signs = (step_sums / step_counts.clamp(min=1) - budgets).sign()
        return signs * (gates[0] - budgets * gates[1]) / step_counts.sum().clamp(min=1)

    def weighted_sum(self, losses: torch.Tensor) -> torch.Tensor:
        """The sum of `losses` [adapters], each times its adapter's `budget_weight`."""
        return (self._config_values("budget_weight", losses) * losses).sum()

    def _config_values(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A number of each adapter's config, [adapters]."""
        return like.new_tensor([getattr(config, name) for config in self.configs.values()])

    def _sum_over_processes(self, value: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(value, "sum") if self.over_processes else value


def gate_mean(gates: torch.Tensor) -> torch.Tensor:
    """The mean gate value of all adapters: scalar, of gates [2, adapters]."""
    return gates[0].sum() / gates[1].sum().clamp(min=1)


@contextmanager
def _restored_random_state(device: torch.device) -> Iterator[None]:
    """After the block, the random generators of torch and numpy (used by SpecAugment) are as they were before it."""
    state = np.random.get_state()
    devices = [device] if device.type not in ("cpu", "meta") else []
    try:
        with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        np.random.set_state(state)
