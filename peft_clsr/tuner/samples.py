"""Route each sample of a batch by its own adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    if not torch.compiler.is_compiling():
        _route_modules_to_save(model, routing)
    with routing.calls.enter(adapter_names=list(adapter_names), labels=labels):
        yield


def _route_modules_to_save(model: nn.Module, routing: RoutingState) -> None:
    """Let the `modules_to_save` of a model follow the running call. PEFT adds them later than the layers."""
    with routing.calls.lock:
        for module in model.modules():
            if type(module) is ModulesToSaveWrapper:
                # PEFT makes them itself, and has no hook that chooses the module of a call.
                module.__class__ = RoutedModulesToSave
                vars(module)["clsr_routing"] = routing


class RoutedModulesToSave(ModulesToSaveWrapper):
    """A `ModulesToSaveWrapper` where each sample takes the module of its adapter."""

    def _sample_names(self) -> list[str] | None:
        names = self.clsr_routing.calls.current(self.training).adapter_names
        return None if names is None else [name if name in self.modules_to_save else BASE for name in names]

    @property
    def active_adapters(self) -> list[str]:
        names = self._sample_names()
        if names is None or len(set(names)) > 1:
            return super().active_adapters
        return [name for name in names[:1] if name != BASE]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = self._sample_names()
        if names is not None and len(set(names)) > 1:
            # PEFT routes samples itself, but only through linear layers, embeddings and convolutions.
            beams = len(args[0]) // len(names)  # the beams of a sample are contiguous
            kwargs["adapter_names"] = [name for name in names for _ in range(beams)]
        return super().forward(*args, **kwargs)
