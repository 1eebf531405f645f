"""Sums of numbers between two logs."""

from __future__ import annotations

from collections import defaultdict

import torch
from accelerate import Accelerator


class LoggedSums:
    """Adds up numbers by name on this process, without a device sync, until `take` reduces and clears them."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor | float] = defaultdict(float)

    def add(self, **values: torch.Tensor | float) -> None:
        for name, value in values.items():
            self._sums[name] += value

    def clear(self) -> None:
        self._sums.clear()

    def take(self, accelerator: Accelerator, reduction: str) -> dict[str, torch.Tensor]:
        """
        Reduce the sums over all processes, and clear them.

        Args:
            accelerator (`Accelerator`): Reaches the other processes.
            reduction (`str`): "sum" or "mean".

        Returns:
            `dict`: name to float32 tensor on the CPU; empty where nothing was added.
        """
        device = accelerator.device
        sums = {name: torch.as_tensor(sum_, dtype=torch.float32, device=device) for name, sum_ in self._sums.items()}
        self.clear()
        return {name: total.cpu() for name, total in accelerator.reduce(sums, reduction=reduction).items()}
