"""Hard routing, in evaluation: each token takes one path. Tokens are grouped by path here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..whisper import module_side
from .experts import add_low_rank, apply_expert, apply_path, can_overwrite_output, is_plain_linear
from .gate import gate_logits

if TYPE_CHECKING:
    from .layer import CLSRLayer

# Grouping tokens needs a device sync. Below this many tokens, computing every path is cheaper.
MIN_TOKENS_TO_GROUP = 16


def choose_hard(layer: CLSRLayer, x: torch.Tensor, adapter_names: list[str]) -> None:
    """Choose a path for each token of `x` [..., in_features], group the tokens by path, and set the route."""
    route = layer.route
    names = route.routing.adapter_names
    if names is None or set(names) == {adapter_names[0]}:
        name = adapter_names[0]
        choice = gate_logits(x, layer.clsr_gate_in[name], layer.clsr_gate_out[name]) >= 0
    else:
        choice = _choose_by_sample(layer, x, names, adapter_names)
    if route.routing.is_collecting:
        route.routing.add(route.name, (choice > 0).float(), layer.clsr_config[adapter_names[0]], trains=False)

    # Low-rank experts add a product to the shared one, so their tokens need no grouping.
    has_full_expert = any(name in layer.clsr_expert for name in adapter_names)
    # Under compilation, group sizes would be data-dependent shapes.
    if torch.compiler.is_compiling() or (
        x.device.type != "cpu" and (not has_full_expert or choice.numel() < MIN_TOKENS_TO_GROUP)
    ):
        route.choice = choice
        return
    choice_of_rows = choice.flatten().long()
    sizes = choice_of_rows.bincount(minlength=len(route.paths)).tolist()
    used = [path for path, size in zip(route.paths, sizes, strict=True) if size]
    if len(used) <= 1:
        route.groups = [(used[0] if used else None, None)]
    elif has_full_expert:
        groups = zip(route.paths, choice_of_rows.argsort(stable=True).split(sizes), strict=True)
        route.groups = [(path, tokens) for path, tokens in groups if len(tokens)]
    else:
        route.choice = choice


def _choose_by_sample(layer: CLSRLayer, x: torch.Tensor, names: list[str], adapter_names: list[str]) -> torch.Tensor:
    """
    The path of each token in a batch of several adapters.

    Args:
        x (`torch.Tensor`): [..., in_features]
        names (`list[str]`): The adapter of each sample.
        adapter_names (`list[str]`): The different adapters.

    Returns:
        `torch.Tensor`: int64 [...]: 0 for the shared path, or 1 + an index into `adapter_names`.
    """
    if module_side(layer.route.name) == "encoder" and len(x) != len(names):
        raise ValueError(
            f"{len(names)} adapter_names for a batch of {len(x)}: Whisper runs a part of a batch again for audio "
            "longer than its context, for timestamps and for several temperatures, and the names would apply to other "
            "samples. Give `language=[...]` instead, which stays with the samples"
        )
    # The tokens of a sample are adjacent, and with beams, those of its beams.
    samples = x.reshape(len(names), -1, x.shape[-1])  # [samples, tokens, in_features]
    choice = torch.zeros(samples.shape[:2], dtype=torch.long, device=x.device)
    for index, name in enumerate(adapter_names, start=1):
        rows = [row for row, sample_name in enumerate(names) if sample_name == name]
        logits = gate_logits(samples[rows], layer.clsr_gate_in[name], layer.clsr_gate_out[name])
        choice[rows] = (logits >= 0).long() * index
    return choice.view(x.shape[:-1])


def project_by_group(layer: CLSRLayer, x: torch.Tensor) -> torch.Tensor:
    """
    The input projection of each token of `x` [..., in_features] by its path.

    Returns:
        `torch.Tensor`: [..., out_features], rows in the order of the route's groups, if there are several.
    """
    groups = layer.route.groups
    if not groups:
        return _select_of_all_paths(layer, x)
    if len(groups) == 1:
        return apply_path(layer, x, groups[0][0])
    rows, result, start = x.reshape(-1, x.shape[-1]), _new_rows(layer, x), 0
    for path, tokens in groups:
        end = start + len(tokens)
        _write_path(layer, rows.index_select(0, tokens), path, result[start:end])
        start = end
    return result.view(*x.shape[:-1], -1)


def project_and_restore_order(layer: CLSRLayer, x: torch.Tensor) -> torch.Tensor:
    """
    The output projection of `x` [..., in_features], whose rows are in the order of the route's groups.

    Returns:
        `torch.Tensor`: [..., out_features], tokens in their original order.
    """
    groups = layer.route.groups
    if not groups:
        return _select_of_all_paths(layer, x)
    if len(groups) == 1:
        return apply_path(layer, x, groups[0][0])
    rows, result = x.reshape(-1, x.shape[-1]), _new_rows(layer, x)
    rows_of_groups = rows.split([len(tokens) for _, tokens in groups])
    for (path, tokens), group in zip(groups, rows_of_groups, strict=True):
        result.index_copy_(0, tokens, apply_path(layer, group, path))
    return result.view(*x.shape[:-1], -1)


def _select_of_all_paths(layer: CLSRLayer, x: torch.Tensor) -> torch.Tensor:
    """The projection [..., out_features] by all paths, of which each token takes the chosen one."""
    route = layer.route
    result = layer.base_layer(x)
    choice = route.choice.view(*x.shape[:-1], 1)
    for index, path in enumerate(route.paths):
        if path in layer.clsr_expert_B:
            in_place = can_overwrite_output(layer, x)
            result = add_low_rank(layer, result, x, path, is_chosen=choice == index, in_place=in_place)
        elif path is not None:
            result = torch.where(choice == index, apply_expert(layer, x, path), result)
    return result


def _new_rows(layer: CLSRLayer, x: torch.Tensor) -> torch.Tensor:
    """An empty tensor [tokens, out_features] for the projections of `x` [..., in_features]."""
    device_type = x.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
    return x.new_empty(x.shape[:-1].numel(), layer.out_features, dtype=dtype)


def _write_path(layer: CLSRLayer, x: torch.Tensor, path: str | None, out: torch.Tensor) -> None:
    """Write the projection of `x` [tokens, in_features] by one path into `out` [tokens, out_features]."""
    linear = layer.base_layer
    if path is not None:
        linear = layer.clsr_expert[path] if path in layer.clsr_expert else None
    # Writing directly saves a tensor as large as `out`, whose allocation costs about as much as the gate.
    if linear is None or torch.is_grad_enabled() or not is_plain_linear(linear, x):
        out.copy_(apply_path(layer, x, path))
    elif linear.bias is None:
        torch.mm(x, linear.weight.t(), out=out)
    else:
        torch.addmm(linear.bias, x, linear.weight.t(), out=out)
