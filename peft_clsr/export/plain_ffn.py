"""Replaces routed FFNs by plain ones, and names them in the adapter's config."""

from __future__ import annotations

import copy
import re
from typing import Literal

import torch
from torch import nn

from ..tuner.config import CLSRConfig
from ..tuner.layer import CLSRLayer
from ..tuner.model import CLSRModel

Decision = Literal["expert", "shared", "routed"]


def routed_projections(base: nn.Module, adapter_name: str) -> dict[str, dict[str, CLSRLayer]]:
    """Gated module to the projections of its FFN that an adapter routes, by name."""
    projections: dict[str, dict[str, CLSRLayer]] = {}
    for key, module in base.named_modules():
        if isinstance(module, CLSRLayer) and adapter_name in module.clsr_config:
            projections.setdefault(module.route.name, {})[key] = module
    return projections


@torch.no_grad()
def replace_ffn(
    base: nn.Module,
    projections: dict[str, CLSRLayer],
    adapter_name: str,
    decision: Decision,
) -> None:
    """Put one FFN into the model: the expert's projections, the shared ones, or the routed ones. Keys are names."""
    for key, layer in projections.items():
        parent, _, attribute = key.rpartition(".")
        projection = layer
        if decision == "expert":
            projection = _expert_linear(layer, adapter_name)
        elif decision == "shared":
            projection = layer.get_base_layer()
        setattr(base.get_submodule(parent), attribute, projection)


def _expert_linear(layer: CLSRLayer, adapter_name: str) -> nn.Linear:
    """The expert's projection in `layer` as a plain linear layer, in the dtype of the shared one."""
    shared = layer.get_base_layer()
    if adapter_name in layer.clsr_expert:
        expert = layer.clsr_expert[adapter_name]
        weight, bias = expert.weight, expert.bias
    else:
        A, B = layer.clsr_expert_A[adapter_name].weight, layer.clsr_expert_B[adapter_name].weight
        weight, bias = B.float() @ A.float() + shared.weight, shared.bias
    linear = copy.deepcopy(shared)  # with its device, dtype and mode
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)
    return linear


def exclude_modules(base: nn.Module, config: CLSRConfig, keys: list[str]) -> None:
    """Add modules to the `exclude_modules` of an adapter's config."""
    excluded = config.exclude_modules or ()
    if isinstance(excluded, str):  # replaced by names: checks refuse an expression with so many names in it
        all_targets = copy.copy(config)
        all_targets.exclude_modules = None
        excluded = [
            key
            for key, _ in base.named_modules()
            if re.fullmatch(excluded, key) and CLSRModel._check_target_module_exists(all_targets, key)
        ]
    config.exclude_modules = {*excluded, *keys}
