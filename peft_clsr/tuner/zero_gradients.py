"""Zero gradients for parameters that a forward pass does not use."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *parameters: nn.Parameter) -> torch.Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
        return (grad_output, *zeros)


def with_zero_gradients(x: torch.Tensor, parameters: list[nn.Parameter]) -> torch.Tensor:
    """
    Return `x` unchanged; its backward pass gives `parameters` gradients of zero.

    DDP and FSDP wait for a gradient of every parameter, on every process and in every step. A skipped module, or an
    expert whose language is not in the batch, would give none.

    Args:
        x (`torch.Tensor`): Any shape; the loss must depend on it.
        parameters (`list[nn.Parameter]`): Parameters that `x` does not depend on.
    """
    return _ZeroGradients.apply(x, *parameters) if parameters else x
