"""Checks that a folder is a CLSR adapter which fits a model, before anything of it reaches the model."""

from __future__ import annotations

import copy
import re
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, inject_adapter_in_model
from peft.utils import CONFIG_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..tuner.adapter_names import short_repr
from ..tuner.config import CLSRConfig
from .configs import is_clsr, read_config
from .weights import PREFIX, check_finite, check_parts, check_shapes, read_shapes, weights_path


def check_adapter_folder(folder: str | Path, model: nn.Module | None = None) -> CLSRConfig:
    """
    Check a CLSR adapter before it is loaded: its config, and that its weights are those of the config.

    Every way of loading calls this by itself ([`~peft.PeftModel.from_pretrained`], `load_adapter`, ...).

    Args:
        folder (`str` or `Path`): A folder with `adapter_config.json` and `adapter_model.safetensors`.
        model (`torch.nn.Module`, *optional*):
            A [`~peft.PeftModel`] or a base model that the weights must fit. It is not changed.

    Returns:
        `CLSRConfig`: the adapter's config.

    Raises:
        ValueError: the folder has no CLSR adapter, or one that must not be loaded; the message says why.
    """
    config = _read_clsr_config(Path(folder))
    check_weights(folder, config, model)
    return config


def check_weights(folder: str | Path, config: CLSRConfig, model: nn.Module | None = None) -> None:
    """Raise a `ValueError` if the weights in a folder do not fit an adapter of `config`, or do not fit `model`."""
    path = weights_path(Path(folder))
    shapes = read_shapes(path)
    check_parts(shapes, config, path)
    if model is not None:
        check_shapes(shapes, shapes_on_copy(model, config), path)
    check_finite(path)


def check_weights_for(folder: str | Path, model: nn.Module, adapter_name: str) -> None:
    """Raise a `ValueError` if the weights in a folder cannot replace those of an adapter of `model`."""
    path = weights_path(Path(folder))
    check_shapes(read_shapes(path), _adapter_shapes(model, adapter_name), path)
    check_finite(path)


def _read_clsr_config(folder: Path) -> CLSRConfig:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG_NAME}: give the folder of one adapter, such as 'experts/ca'")
    attributes = read_config(path)
    if not is_clsr(attributes):
        found = attributes.get("peft_type") if isinstance(attributes, dict) else attributes
        raise ValueError(f"peft_type in {path} is {short_repr(found)}, expected 'CLSR': load it with PEFT")
    return CLSRConfig.from_pretrained(str(folder))


def shapes_on_copy(model: nn.Module, config: CLSRConfig) -> dict[str, torch.Size]:
    """
    Names and shapes that the weights of an adapter of `config` on `model` have in a file.

    PEFT itself puts the adapter on a copy of the model without data. What PEFT refuses is so refused here, where
    nothing is half done.
    """
    name = "adapter"
    while name in (getattr(model, "peft_config", None) or {}):
        name += "_"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # loading gives them again
            twin = _copy_without_data(model)
            if isinstance(twin, PeftModel):
                twin.add_adapter(name, copy.deepcopy(config), low_cpu_mem_usage=True)
            else:
                inject_adapter_in_model(copy.deepcopy(config), twin, name, low_cpu_mem_usage=True)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"the adapter cannot be put on a {type(model).__name__} ({type(error).__name__}: {error}): take the base "
            "model that it was trained for"
        ) from error
    return _adapter_shapes(twin, name)


def _adapter_shapes(model: nn.Module, adapter_name: str) -> dict[str, torch.Size]:
    """Names and shapes that the weights of an adapter of `model` have in a file."""
    of_adapter = re.compile(rf"\.(clsr_\w+)\.{re.escape(adapter_name)}\.(?=\w+$)")
    state_dict = model.state_dict()
    shapes = {of_adapter.sub(r".\1.", key): t.shape for key, t in state_dict.items() if of_adapter.search(key)}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):  # modules_to_save
            own = {key.removeprefix(f"{name}."): t for key, t in state_dict.items() if key.startswith(f"{name}.")}
            saved = module.adapter_state_dict(adapter_name, own)
            shapes.update({f"{name}.{key}": tensor.shape for key, tensor in saved.items()})
    return {PREFIX + key.removeprefix(PREFIX): shape for key, shape in shapes.items()}


def _copy_without_data(model: nn.Module) -> nn.Module:
    """A copy of a model with its weights on the meta device: it takes no memory, and shares nothing with the model."""
    memo: dict[int, Any] = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if "embed_positions" in name:
            continue  # small, and max_audio_seconds cannot cut it without data
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    for module in model.modules():
        if hasattr(module, "_hf_hook"):  # accelerate's; it holds the weights of an offloaded base
            memo[id(module._hf_hook)] = None
    return copy.deepcopy(model, memo)
