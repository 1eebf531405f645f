"""The gate: per token, how much of the expert to use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class GateLinear(nn.Linear):
    """
    A linear layer that always computes in float32, regardless of autocast, its own dtype and that of its input.

    The choice is made at a logit of 0, near which half precision has too few bits.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        with torch.autocast(device_type=x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


def noise_deviation(progress: float | None, gate_noise: float, straight_through: bool) -> float:
    """
    Standard deviation of the noise on gate logits.

    Soft gates learn to be decisive from noise that rises until the end of training. Straight-through gates are
    decisive from the start. Their noise falls to 0 in the first half of training, so that each token tries both paths
    first.

    Args:
        progress (`float` or `None`): Progress of training, in [0, 1]. `None`, if it is unknown, means no noise.
        gate_noise (`float`): The highest deviation.
        straight_through (`bool`): True if gates are 0 or 1 in training, too.

    Returns:
        `float`: at least 0.
    """
    if progress is None:
        return 0.0
    return gate_noise * (max(1 - 2 * progress, 0.0) if straight_through else progress)


def gate_logits(hidden_states: torch.Tensor, gate_in: GateLinear, gate_out: GateLinear) -> torch.Tensor:
    """
    `G(x) = w2ᵀ relu(W1 x + b1)` (Zhang et al., ICLR 2021, eq. 5).

    Args:
        hidden_states (`torch.Tensor`): [..., hidden]
        gate_in (`GateLinear`): hidden → gate_dim, with bias (W1, b1).
        gate_out (`GateLinear`): gate_dim → 1, without bias (w2).

    Returns:
        `torch.Tensor`: float32 [...]. At 0 and above, evaluation takes the expert.
    """
    return gate_out(F.relu(gate_in(hidden_states))).squeeze(-1)
