"""Projection by one path: the shared weight, a full expert, or a low-rank expert on top of the shared one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .layer import CLSRLayer


def project(layer: CLSRLayer, x: torch.Tensor, path: str | None) -> torch.Tensor:
    """The projection [..., out_features] of `x` [..., in_features] by a path: an adapter, or `None` for shared."""
    return layer.base_layer(x) if path is None else project_by_expert(layer, x, path)


def project_by_expert(
    layer: CLSRLayer, x: torch.Tensor, adapter_name: str, shared: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The expert's projection [..., out_features] of `x` [..., in_features], in the precision of the shared projection.

    `shared` is the shared projection of `x`, if it is known: a low-rank expert then need not compute it.
    """
    if adapter_name in layer.clsr_expert:
        expert = layer.clsr_expert[adapter_name]
        result = expert(layer._cast_input_dtype(x, expert.weight.dtype))
    elif shared is None:
        in_place = can_overwrite_output(layer, x)
        result = add_low_rank(layer, layer.base_layer(x), x, adapter_name, in_place=in_place)
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
    `result` [..., out_features] plus the low-rank product `B(A(x))` of `x` [..., in_features].

    `is_chosen`, boolean [..., 1], selects the tokens that the product is added to; by default all.
    """
    A, B = layer.clsr_expert_A[adapter_name], layer.clsr_expert_B[adapter_name]
    hidden = A(layer._cast_input_dtype(x, A.weight.dtype))
    if is_chosen is not None:
        hidden = torch.where(is_chosen, hidden, 0)  # times 0 would turn an overflow into NaN
    if not is_plain_linear(B, hidden) or result.dtype != hidden.dtype:
        return (result + B(hidden.to(B.weight.dtype))).to(result.dtype)
    rows = result.view(-1, result.shape[-1])
    add = rows.addmm_ if in_place else partial(torch.addmm, rows)  # product and sum in one operation
    return add(hidden.view(-1, hidden.shape[-1]), B.weight.t()).view(result.shape)


def project_into(layer: CLSRLayer, x: torch.Tensor, path: str | None, out: torch.Tensor) -> None:
    """Write the projection of `x` [tokens, in_features] by one path into `out` [tokens, out_features]."""
    linear = layer.base_layer if path is None else layer.clsr_expert[path] if path in layer.clsr_expert else None
    # A product that is written into `out` needs no temporary tensor, whose allocation costs as much as the gate.
    if linear is None or torch.is_grad_enabled() or not is_plain_linear(linear, x):
        out.copy_(project(layer, x, path))
    elif linear.bias is None:
        torch.mm(x, linear.weight.t(), out=out)
    else:
        torch.addmm(linear.bias, x, linear.weight.t(), out=out)


def can_overwrite_output(layer: CLSRLayer, x: torch.Tensor) -> bool:
    """True if the shared projection of `x` may be overwritten in place: no graph and no hook holds it."""
    return not torch.is_grad_enabled() and is_plain_linear(layer.base_layer, x)


def is_plain_linear(linear: nn.Module, x: torch.Tensor) -> bool:
    """
    True if `linear(x)` is just a product with its weight, so that another operation may compute it.

    False for layers that are quantized, sharded, offloaded, hooked, or in another precision than `x`.
    """
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and linear.weight.dtype == x.dtype
        and not torch.is_autocast_enabled(x.device.type)
        and "forward" not in vars(linear)  # accelerate offloads by replacing `forward`
        and not (linear._forward_hooks or linear._forward_pre_hooks)
    )
