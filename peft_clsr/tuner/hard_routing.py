"""
Hard routing, for evaluation: each token takes one path.

With full experts, the tokens are grouped by path, and each group is projected by its own weight. With low-rank experts
there is nothing to group: every token takes the shared weight, and a token of an expert adds a small product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..whisper import module_side
from .expert import add_low_rank, can_overwrite_output, project, project_by_expert, project_into
from .route import keep_routed

if TYPE_CHECKING:
    from .layer import CLSRLayer
    from .route import TokenPaths

# Grouping tokens needs a device sync. Below this many tokens, computing every path is cheaper on an accelerator.
MIN_TOKENS_TO_GROUP = 16


def choose(layer: CLSRLayer, x: torch.Tensor, adapter_names: list[str]) -> None:
    """Set `groups` or `choice` of the layer's `TokenPaths` for the tokens of `x` [..., in_features]."""
    route, tokens = layer.route, layer.route.tokens
    sample_names = route.routing.adapter_names
    if sample_names is None or set(sample_names) == {adapter_names[0]}:
        choice = layer.gate_logits(x, adapter_names[0]) >= 0
    else:
        choice = _choose_by_sample(layer, x, sample_names, adapter_names)
    shared_samples = route.shared_samples(layer.training)
    if shared_samples is not None:
        choice = keep_routed(choice, shared_samples)
    if route.routing.is_collecting:
        config = layer.clsr_config[adapter_names[0]]
        # In training these gates are frozen, and the budget is for those that are trained.
        counts = not layer.training
        route.routing.add_gate_values(route.name, (choice > 0).float(), config, is_trained=False, counts=counts)

    has_full_expert = any(name in layer.clsr_expert for name in adapter_names)
    # Under torch.compile, sizes of groups would be shapes that depend on data.
    if torch.compiler.is_compiling() or _is_sync_too_slow(choice, has_full_expert):
        tokens.choice = choice
    else:
        _group_tokens(tokens, choice, has_full_expert)


def _is_sync_too_slow(choice: torch.Tensor, has_full_expert: bool) -> bool:
    return choice.device.type != "cpu" and (not has_full_expert or choice.numel() < MIN_TOKENS_TO_GROUP)


def _choose_by_sample(
    layer: CLSRLayer, x: torch.Tensor, sample_names: list[str], adapter_names: list[str]
) -> torch.Tensor:
    """
    The path of each token, where each sample has an adapter of its own.

    Args:
        x (`torch.Tensor`): [..., in_features]; the tokens of a sample, or of all its beams, are contiguous.
        sample_names (`list[str]`): Adapter of each sample.
        adapter_names (`list[str]`): The different adapters among them that this layer has.

    Returns:
        `torch.Tensor`: int64 [...], 0 for the shared FFN, else 1 + an index into `adapter_names`.
    """
    if module_side(layer.route.name) == "encoder" and len(x) != len(sample_names):
        raise ValueError(
            f"{len(sample_names)} adapter_names for a batch of {len(x)}: for audio longer than its context, for "
            "timestamps and for several temperatures, Whisper runs a part of the batch again, and the names would "
            "go to the wrong samples. Give `language=[...]` instead, which stays with its samples"
        )
    samples = x.reshape(len(sample_names), -1, x.shape[-1])  # [samples, tokens, in_features]
    choice = torch.zeros(samples.shape[:2], dtype=torch.long, device=x.device)
    for index, adapter_name in enumerate(adapter_names, start=1):
        rows = [row for row, sample_name in enumerate(sample_names) if sample_name == adapter_name]
        choice[rows] = (layer.gate_logits(samples[rows], adapter_name) >= 0).long() * index
    return choice.view(x.shape[:-1])


def _group_tokens(tokens: TokenPaths, choice: torch.Tensor, has_full_expert: bool) -> None:
    """
    Group the tokens by the path that `choice` [...] gives them, in `tokens.groups`.

    Without a full expert, tokens of several paths stay ungrouped, and `tokens.choice` is set instead.
    """
    path_of_token = choice.flatten().long()
    sizes = path_of_token.bincount(minlength=len(tokens.paths)).tolist()
    used = [path for path, size in zip(tokens.paths, sizes, strict=True) if size]
    if len(used) <= 1:
        tokens.groups = [(used[0] if used else None, None)]
    elif has_full_expert:
        groups = zip(tokens.paths, path_of_token.argsort(stable=True).split(sizes), strict=True)
        tokens.groups = [(path, indices) for path, indices in groups if len(indices)]
    else:
        tokens.choice = choice


def project_input(layer: CLSRLayer, x: torch.Tensor) -> torch.Tensor:
    """
    The projection [..., out_features] of each token of `x` [..., in_features] by its path.

    If tokens are grouped, the rows of the result are in the order of the groups, not of the tokens.
    """
    groups = layer.route.tokens.groups
    if not groups:
        return _project_by_all_paths(layer, x)
    if len(groups) == 1:
        return project(layer, x, groups[0][0])
    rows, result, start = x.reshape(-1, x.shape[-1]), _empty_rows(layer, x), 0
    for path, tokens in groups:
        end = start + len(tokens)
        project_into(layer, rows.index_select(0, tokens), path, result[start:end])
        start = end
    return result.view(*x.shape[:-1], -1)


def project_output(layer: CLSRLayer, x: torch.Tensor) -> torch.Tensor:
    """
    The projection [..., out_features] of each token by its path, tokens in their own order again.

    `x` [..., in_features] is in the order that [`project_input`] returned.
    """
    groups = layer.route.tokens.groups
    if not groups:
        return _project_by_all_paths(layer, x)
    if len(groups) == 1:
        return project(layer, x, groups[0][0])
    rows, result = x.reshape(-1, x.shape[-1]), _empty_rows(layer, x)
    rows_of_groups = rows.split([len(tokens) for _, tokens in groups])
    for (path, tokens), group in zip(groups, rows_of_groups, strict=True):
        result.index_copy_(0, tokens, project(layer, group, path))
    return result.view(*x.shape[:-1], -1)


def _project_by_all_paths(layer: CLSRLayer, x: torch.Tensor) -> torch.Tensor:
    """Project `x` [..., in_features] by every path, and select for each token that of `choice`."""
    tokens = layer.route.tokens
    result = layer.base_layer(x)
    choice = tokens.choice.view(*x.shape[:-1], 1)
    for index, path in enumerate(tokens.paths):
        if path in layer.clsr_expert_B:
            result = add_low_rank(layer, result, x, path, choice == index, can_overwrite_output(layer, x))
        elif path is not None:
            result = torch.where(choice == index, project_by_expert(layer, x, path), result)
    return result


def _empty_rows(layer: CLSRLayer, x: torch.Tensor) -> torch.Tensor:
    """An uninitialized tensor for the projections of `x` [..., in_features]: [tokens, out_features]."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return x.new_empty(x.shape[:-1].numel(), layer.out_features, dtype=dtype)
