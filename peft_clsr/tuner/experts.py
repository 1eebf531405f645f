"""Applies an expert's projection: a full copy of the shared one, or a low-rank difference to it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .layer import CLSRLayer


def apply_path(layer: CLSRLayer, x: torch.Tensor, path: str | None) -> torch.Tensor:
    """The projection [..., out_features] of `x` [..., in_features] by one path: `None` is the shared one."""
    return layer.base_layer(x) if path is None else apply_expert(layer, x, path)


def apply_expert(
    layer: CLSRLayer, x: torch.Tensor, adapter_name: str, shared: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The expert's projection of `x`, in the dtype of the shared projection.

    Args:
        layer (`CLSRLayer`): The projection.
        x (`torch.Tensor`): [..., in_features]
        adapter_name (`str`): The expert.
        shared (`torch.Tensor`, *optional*):
            The shared projection of `x` [..., out_features], so that a low-rank expert need not compute it again.

    Returns:
        `torch.Tensor`: [..., out_features]
    """
    if adapter_name in layer.clsr_expert:
        expert = layer.clsr_expert[adapter_name]
        result = expert(layer._cast_input_dtype(x, expert.weight.dtype))
    elif shared is None:
        result = add_low_rank(layer, layer.base_layer(x), x, adapter_name, in_place=can_overwrite_output(layer, x))
    else:
        result = add_low_rank(layer, shared, x, adapter_name)
    return result if torch.is_autocast_enabled(x.device.type) else result.to(x.dtype)


def add_low_rank(
    layer: CLSRLayer,
    result: torch.Tensor,
    x: torch.Tensor,
    adapter_name: str,
    is_chosen: torch.Tensor | None = None,
    in_place: bool = False,
) -> torch.Tensor:
    """
    `result` [..., out_features] plus the low-rank product B(A(x)) of `x` [..., in_features].

    Args:
        is_chosen (`torch.Tensor`, *optional*): Boolean [..., 1]. Other rows get no product.
        in_place (`bool`): Write into `result`.
    """
    A, B = layer.clsr_expert_A[adapter_name], layer.clsr_expert_B[adapter_name]
    hidden = A(layer._cast_input_dtype(x, A.weight.dtype))
    if is_chosen is not None:
        hidden = torch.where(is_chosen, hidden, 0)  # a product with 0 would turn an overflow into NaN
    if not is_plain_linear(B, hidden) or result.dtype != hidden.dtype:
        return (result + B(hidden.to(B.weight.dtype))).to(result.dtype)
    rows = result.view(-1, result.shape[-1])
    add = rows.addmm_ if in_place else partial(torch.addmm, rows)  # product and sum in one operation
    return add(hidden.view(-1, hidden.shape[-1]), B.weight.t()).view(result.shape)


def can_overwrite_output(layer: CLSRLayer, x: torch.Tensor) -> bool:
    """True if the base layer's output for `x` may be overwritten in place: no graph and no hook keeps it."""
    return not torch.is_grad_enabled() and is_plain_linear(layer.base_layer, x)


def is_plain_linear(linear: nn.Module, x: torch.Tensor) -> bool:
    """
    True if a layer only multiplies `x` with a weight, so that another operation may compute the same.

    False for a quantized, sharded, offloaded or hooked layer, and one of another dtype.
    """
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and linear.weight.dtype == x.dtype
        and not torch.is_autocast_enabled(x.device.type)
        and "forward" not in vars(linear)  # accelerate replaces it to offload
        and not (linear._forward_hooks or linear._forward_pre_hooks)
    )
