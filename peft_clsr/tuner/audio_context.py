"""`max_audio_seconds` of adapters: all adapters on a Whisper share one audio context, as does the base."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ..whisper import check_audio_context, cut_positions, set_positions
from .config import CLSRConfig
from .route import RoutingState


def resolve_audio_context(config: CLSRConfig, model: nn.Module, adapters: dict[str, Any]) -> None:
    """
    Set `config.max_audio_seconds` to the context of the other adapters if it is `None`, and check that it fits.

    Args:
        config (`CLSRConfig`): That of the new adapter.
        model (`nn.Module`): The base model.
        adapters (`dict[str, PeftConfig]`): All adapters by name, `config` among them, other methods too.

    Raises:
        ValueError: the model's context cannot be that of the adapter; nothing is changed in the model.
    """
    others = {name: other for name, other in adapters.items() if other is not config and isinstance(other, CLSRConfig)}
    if config.max_audio_seconds is None:
        cutter = next((name for name, other in others.items() if other.max_audio_seconds is not None), None)
        if cutter is not None:
            config.max_audio_seconds = others[cutter].max_audio_seconds
            if config.inference_mode:  # loaded, not new: it may have been trained at another context
                names = [name for name, other in adapters.items() if other is config]
                _warn_of_shared_context(names, config.max_audio_seconds, cutter)
    if config.max_audio_seconds is not None:
        check_audio_context(model, config.max_audio_seconds, others)


def cut_audio_context(model: nn.Module, routing: RoutingState, adapters: dict[str, Any], adapter_name: str) -> None:
    """Cut the context of the model to that of an adapter, and keep the full one in `routing.full_positions`."""
    seconds = adapters[adapter_name].max_audio_seconds
    table = None if seconds is None else cut_positions(model, seconds)
    if table is None:
        return
    routing.full_positions = table
    others = [name for name, config in adapters.items() if getattr(config, "max_audio_seconds", 0) is None]
    if others:
        _warn_of_shared_context(others, seconds, adapter_name)


def restore_audio_context(model: nn.Module, routing: RoutingState) -> None:
    """Undo `cut_audio_context`."""
    if routing.full_positions is not None:
        set_positions(model, routing.full_positions)
        routing.full_positions = None


def _warn_of_shared_context(names: list[str], seconds: float, adapter_name: str) -> None:
    warnings.warn(
        f"adapters {names} were not made for the audio context of {seconds:g} s that adapter {adapter_name!r} has, "
        "and all adapters on a model share one, as does the base: keep those of other contexts on models of their own",
        stacklevel=3,
    )
