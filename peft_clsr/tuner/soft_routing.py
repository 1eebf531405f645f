"""Soft routing, for training: both paths are computed for every token, and blended by the gate value."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .expert import project_by_expert
from .gate import noise_deviation
from .route import keep_routed

if TYPE_CHECKING:
    from .layer import CLSRLayer


def choose(layer: CLSRLayer, x: torch.Tensor, adapter_name: str) -> None:
    """
    Set `gate` or `is_skipped` of the layer's `TokenPaths` for the tokens of `x` [..., in_features].

    A skipped module keeps its gate values in the budget, with their gradient, as in the reference implementation.
    """
    config, route, tokens = layer.clsr_config[adapter_name], layer.route, layer.route.tokens
    is_compiling = torch.compiler.is_compiling()
    # torch's generator, because gradient checkpointing restores its state; on the CPU, to avoid a device sync.
    tokens.is_skipped = not is_compiling and torch.rand((), device="cpu").item() < config.skip_gate_prob
    logits = layer.gate_logits(F.dropout(x, config.gate_dropout), adapter_name)
    deviation = noise_deviation(route.routing.gate_progress, config.gate_noise, config.straight_through)
    if deviation:
        logits = logits + deviation * torch.randn_like(logits)
    gate_values = logits.sigmoid()
    if config.straight_through:
        gate_values = gate_values + ((logits >= 0).to(gate_values.dtype) - gate_values).detach()
    shared_samples = route.shared_samples(is_training=True)
    if shared_samples is not None:
        gate_values = keep_routed(gate_values, shared_samples)
    is_trained = layer.clsr_gate_out[adapter_name].weight.requires_grad
    route.routing.add_gate_values(route.name, gate_values, config, is_trained)
    if tokens.is_skipped:
        return
    if is_compiling and config.skip_gate_prob:  # a branch on a random number would break the graph
        gate_values = gate_values * (torch.rand((), device=x.device) >= config.skip_gate_prob)
    tokens.gate = gate_values.unsqueeze(-1)


def project_input(layer: CLSRLayer, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
    """
    Input projections of `x` [..., in_features] by both paths, side by side: [..., 2 · out_features], shared first.

    Of a skipped FFN, the shared projection alone: [..., out_features].
    """
    shared = layer.base_layer(x)
    if layer.route.tokens.is_skipped:
        return shared
    return torch.cat([shared, project_by_expert(layer, x, adapter_name, shared)], dim=-1)


def project_output(layer: CLSRLayer, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
    """
    Output projections of both halves of `x` [..., 2 · in_features], blended by the gate: [..., out_features].

    With a low-rank expert, one product with the shared weight serves both halves: it takes their blend. Therefore
    `expert_dropout` is on the input of the expert's output projection, and its noise reaches the shared weight too.

    Of a skipped FFN, `x` [..., in_features] is the shared half alone.
    """
    if layer.route.tokens.is_skipped:
        return layer.base_layer(x)
    shared_half, expert_half = x.chunk(2, dim=-1)
    gate = layer.route.tokens.gate.view(*x.shape[:-1], 1)
    dropout = layer.clsr_config[adapter_name].expert_dropout
    if adapter_name in layer.clsr_expert:
        shared = layer.base_layer(shared_half)
        expert = F.dropout(project_by_expert(layer, expert_half, adapter_name), dropout)
        return (shared + gate * (expert - shared)).to(shared.dtype)
    expert_half = F.dropout(expert_half, dropout)
    shared = layer.base_layer(torch.lerp(shared_half, expert_half, gate.to(x.dtype)))
    A, B = layer.clsr_expert_A[adapter_name], layer.clsr_expert_B[adapter_name]
    low_rank = B(A(layer._cast_input_dtype(expert_half, A.weight.dtype)))
    return (shared + gate * low_rank).to(shared.dtype)
