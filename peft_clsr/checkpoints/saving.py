"""Checks of an adapter before it is saved: a file that no loader accepts is never written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..tuner.config import CLSRConfig


def check_save_of_peft(arguments: dict[str, Any]) -> None:
    """Check a call of `PeftModel.save_pretrained`, given its arguments by name."""
    model = arguments["self"]
    _check(model, arguments["selected_adapters"] or model.peft_config, arguments, arguments["safe_serialization"])


def check_save_of_transformers(arguments: dict[str, Any]) -> None:
    """Check a call of transformers' `save_pretrained`, which saves the active adapter of `add_adapter` alone."""
    model = arguments["self"]
    if getattr(model, "_hf_peft_config_loaded", False):
        _check(model, model.active_adapters(), arguments, arguments["kwargs"].get("safe_serialization", True))


def _check(model: Any, adapters: Iterable[str], arguments: dict[str, Any], safe_serialization: bool) -> None:
    adapters = [name for name in adapters if isinstance(model.peft_config.get(name), CLSRConfig)]
    if adapters and not safe_serialization:
        raise ValueError(
            f"safe_serialization={safe_serialization} would write a pickle, which no loader accepts for a CLSR "
            "adapter: leave it out, and the adapter is saved as safetensors"
        )
    state_dict = arguments.get("state_dict") or arguments["kwargs"].get("state_dict")
    try:
        for name in adapters:
            check_adapter_is_finite(model, name, state_dict)
    except ValueError:
        folder = arguments["save_directory"]
        if os.path.isdir(folder) and not os.listdir(folder):  # made by Trainer, which would resume from it
            os.rmdir(folder)
        raise


def check_adapter_is_finite(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor] | None = None
) -> None:
    """
    Check the weights of an adapter.

    Args:
        model (`nn.Module`): A model with the adapter.
        adapter_name (`str`): Its name.
        state_dict (`Mapping[str, torch.Tensor]`, *optional*): The weights to check, by default those of the model.

    Raises:
        ValueError: a tensor has values that are NaN or infinite.
    """
    of_adapter = re.compile(rf"\.(clsr_\w+|modules_to_save)\.{re.escape(adapter_name)}\.")
    # Not model.state_dict(), which FSDP makes a call of all processes.
    named_tensors = state_dict.items() if state_dict else chain(model.named_parameters(), model.named_buffers())
    for key, tensor in named_tensors:
        is_checked = of_adapter.search(key) and isinstance(tensor, torch.Tensor) and not tensor.is_meta
        if is_checked and not tensor.isfinite().all():
            raise ValueError(
                f"tensor {key!r} of adapter {adapter_name!r} has values that are NaN or infinite, so the adapter is "
                "not saved: go back to an earlier checkpoint, and train with a lower learning rate or in float32 or "
                "bfloat16"
            )
