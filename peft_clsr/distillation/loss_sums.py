"""Sums of the parts of the loss, for logs and evaluation."""

from __future__ import annotations

from collections import defaultdict

import torch
from accelerate import Accelerator


class LossSums:
    """Adds up values by name on the device, so that a step needs no device sync."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sums: dict[str, torch.Tensor | float] = defaultdict(float)

    def add(self, **values: torch.Tensor | float) -> None:
        for name, value in values.items():
            self.sums[name] += value

    def clear(self) -> None:
        self.sums.clear()

    def reduce(self, reduction: str) -> dict[str, torch.Tensor]:
        """Clear the sums and return them as float32 on the CPU, reduced over processes by "mean" or "sum"."""
        device = self.accelerator.device
        totals = {name: torch.as_tensor(sum_, dtype=torch.float32, device=device) for name, sum_ in self.sums.items()}
        self.clear()
        return {name: total.cpu() for name, total in self.accelerator.reduce(totals, reduction=reduction).items()}
