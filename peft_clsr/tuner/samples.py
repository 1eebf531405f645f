"""Route each sample of a batch by its own adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .adapter_names import BASE
from .route import RoutingState

if TYPE_CHECKING:
    from .config import CLSRConfig


@contextmanager
def use_adapter_per_sample(
    model: nn.Module,
    routing: RoutingState,
    adapter_names: list[str],
    labels: torch.Tensor | None = None,
    shared_decoder: list[bool] | None = None,
) -> Iterator[None]:
    """
    Within this context, route each sample of a batch by its own adapter; see [`CLSRModel.route_samples`].

    Args:
        model (`nn.Module`): The base model.
        routing (`RoutingState`): The state of the model.
        shared_decoder (`list[bool]`, *optional*): Of [`shared_decoder_samples`].
    """
    if model.training and len(set(adapter_names)) > 1:
        raise ValueError(
            f"a batch of the adapters {sorted(set(adapter_names))} in training mode, expected one: make batches "
            "of one language with LanguageBatchSampler (DistillationTrainer does), or call model.eval()"
        )
    if not torch.compiler.is_compiling():
        _route_modules_to_save(model, routing)
    with routing.calls.enter(adapter_names=list(adapter_names), labels=labels, shared_decoder=shared_decoder):
        yield


def shared_decoder_samples(
    model: nn.Module, adapters: Mapping[str, CLSRConfig], adapter_names: Sequence[str | None], tokens: torch.Tensor
) -> list[bool] | None:
    """
    Find the samples whose decoder takes the shared FFNs: they translate, and their adapter's
    `translate_with_shared_decoder` is set.

    Args:
        model (`nn.Module`): The base model.
        adapters (`Mapping[str, CLSRConfig]`): Its adapters by name.
        adapter_names (`Sequence[str]`): The adapter of each sample.
        tokens (`torch.Tensor`): int64 [samples, tokens]: prompts, or labels that begin with them.

    Returns:
        `list[bool]` or `None`: True for such a sample; `None` if there is none.
    """
    generation_config = getattr(model, "generation_config", None)
    token = (getattr(generation_config, "task_to_id", None) or {}).get("translate")
    chosen = {name for name, config in adapters.items() if config.translate_with_shared_decoder}
    if token is None or chosen.isdisjoint(adapter_names):
        return None
    translates = (tokens == token).any(dim=1).tolist()
    shared = [flag and name in chosen for flag, name in zip(translates, adapter_names, strict=True)]
    return shared if any(shared) else None


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
