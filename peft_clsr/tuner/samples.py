"""Route each sample of a batch by its own adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .adapter_names import BASE
from .route import RoutingState


@contextmanager
def use_adapter_per_sample(
    model: nn.Module, routing: RoutingState, adapter_names: list[str], labels: torch.Tensor | None = None
) -> Iterator[None]:
    """
    Within this context, route each sample of a batch by its own adapter; see [`CLSRModel.route_samples`].

    Args:
        model (`nn.Module`): The base model.
        routing (`RoutingState`): The state of the model.
    """
    if model.training and len(set(adapter_names)) > 1:
        raise ValueError(
            f"a batch of the adapters {sorted(set(adapter_names))} in training mode, expected one: make batches "
            "of one language with LanguageBatchSampler (DistillationTrainer does), or call model.eval()"
        )
    outer = routing.adapter_names, routing.labels
    routing.adapter_names, routing.labels = list(adapter_names), labels
    try:
        with _route_modules_to_save(model, list(adapter_names)):
            yield
    finally:
        routing.adapter_names, routing.labels = outer


@contextmanager
def _route_modules_to_save(model: nn.Module, adapter_names: list[str]) -> Iterator[None]:
    """Within this context, each sample takes the `modules_to_save` of its adapter."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    active = [wrapper._active_adapter for wrapper in wrappers]
    hooks = []
    for wrapper in wrappers:
        names = [name if name in wrapper.modules_to_save else BASE for name in adapter_names]
        if len(set(names)) == 1:
            wrapper._active_adapter = [name for name in names[:1] if name != BASE]
        else:  # PEFT routes samples itself, but only through linear layers, embeddings and convolutions
            hooks.append(wrapper.register_forward_pre_hook(partial(_pass_names, names), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for wrapper, names in zip(wrappers, active, strict=True):
            wrapper._active_adapter = names


def _pass_names(names: list[str], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    beams = len(args[0]) // len(names)  # the beams of a sample are contiguous
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(beams)]}
