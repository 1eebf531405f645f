"""Soft routing, in training: both paths are computed and blended by the gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .experts import apply_expert
from .gate import gate_logits, noise_deviation

if TYPE_CHECKING:
    from .layer import CLSRLayer


def choose_soft(layer: CLSRLayer, x: torch.Tensor, adapter_name: str) -> None:
    """Compute the gate values of the tokens of `x` [..., in_features], or skip the gate, and set the route."""
    config, route = layer.clsr_config[adapter_name], layer.route
    gate_in, gate_out = layer.clsr_gate_in[adapter_name], layer.clsr_gate_out[adapter_name]
    is_compiling = torch.compiler.is_compiling()
    # Gradient checkpointing repeats draws of torch's generator. Drawing on the CPU needs no device sync.
    if not is_compiling and torch.rand((), device="cpu").item() < config.skip_gate_prob:
        route.is_skipped = True
        route.routing.add(route.name, torch.zeros(x.shape[:-1], device=x.device), config, trains=False)
        return
    logits = gate_logits(F.dropout(x, config.gate_dropout), gate_in, gate_out)
    alpha = noise_deviation(route.routing.gate_progress, config.gate_noise, config.straight_through)
    if alpha:
        logits = logits + alpha * torch.randn_like(logits)
    gate_values = logits.sigmoid()
    if config.straight_through:
        gate_values = gate_values + ((logits >= 0).to(gate_values.dtype) - gate_values).detach()
    if is_compiling and config.skip_gate_prob:  # a branch on a random number would break the graph
        gate_values = gate_values * (torch.rand((), device=x.device) >= config.skip_gate_prob)
    route.gate = gate_values.unsqueeze(-1)
    route.routing.add(route.name, gate_values, config, trains=gate_out.weight.requires_grad)


def project_both_paths(layer: CLSRLayer, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
    """
    The input projection by both paths.

    Returns:
        `torch.Tensor`: [..., 2 · out_features], the shared half first; [..., out_features] if the gate is skipped.
    """
    shared = layer.base_layer(x)
    if layer.route.is_skipped:
        return shared
    return torch.cat([shared, apply_expert(layer, x, adapter_name, shared)], dim=-1)


def blend_paths(layer: CLSRLayer, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
    """
    The output projections of both halves of `x` [..., 2 · in_features], blended by the gate.

    For a low-rank expert the shared weight takes the blend of both halves, in one product. So `expert_dropout` acts on
    the input of the expert's projection.

    Returns:
        `torch.Tensor`: [..., out_features]
    """
    if layer.route.is_skipped:
        return layer.base_layer(x)
    shared_half, expert_half = x.chunk(2, dim=-1)
    gate = layer.route.gate.view(*x.shape[:-1], 1)
    dropout = layer.clsr_config[adapter_name].expert_dropout
    if adapter_name in layer.clsr_expert:
        shared = layer.base_layer(shared_half)
        expert = F.dropout(apply_expert(layer, expert_half, adapter_name), dropout)
        return (shared + gate * (expert - shared)).to(shared.dtype)
    expert_half = F.dropout(expert_half, dropout)
    shared = layer.base_layer(torch.lerp(shared_half, expert_half, gate.to(x.dtype)))
    A, B = layer.clsr_expert_A[adapter_name], layer.clsr_expert_B[adapter_name]
    low_rank = B(A(layer._cast_input_dtype(expert_half, A.weight.dtype)))
    return (shared + gate * low_rank).to(shared.dtype)
