"""Which modules of a model a config matches as projections of an FFN, and checks that it matches whole FFNs."""

from __future__ import annotations

import copy
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from .config import CLSRConfig


def is_projection(config: CLSRConfig, key: str) -> Any:
    """Truthy if the module `key` is an input or output projection by PEFT's rules for `target_modules`."""
    return check_target_module_exists(config, key) or is_output_projection(config, key)


def is_output_projection(config: CLSRConfig, key: str) -> Any:
    """Truthy if the module `key` is an output projection by PEFT's rules for `target_modules`."""
    outputs = copy.copy(config)
    outputs.target_modules = config.output_modules
    return check_target_module_exists(outputs, key)


def check_ffns(config: CLSRConfig, model: nn.Module) -> None:
    """
    Check that each FFN of which a config matches a projection is matched as a whole.

    Raises:
        TypeError: a matched module is no `torch.nn.Linear`.
        ValueError: a parent module has no input projection, or not exactly one output projection, or their sizes
            do not fit.
    """
    inputs: dict[str, list[nn.Linear]] = {}
    outputs: dict[str, list[nn.Linear]] = {}
    in_tuner_layers = tuple(f"{key}." for key, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    for key, module in model.named_modules():
        if not key or key.startswith(in_tuner_layers) or not is_projection(config, key):
            continue
        base_layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if not isinstance(base_layer, nn.Linear):
            raise TypeError(
                f"module {key!r} is a {type(base_layer).__name__}, expected torch.nn.Linear: name the projections "
                "of the FFN in target_modules and output_modules"
            )
        projections = outputs if is_output_projection(config, key) else inputs
        projections.setdefault(key.rpartition(".")[0], []).append(base_layer)

    for parent in {**inputs, **outputs}:
        input_layers, output_layers = inputs.get(parent, []), outputs.get(parent, [])
        where = f"in module {parent!r}" if parent else "at the top of the model"
        if not input_layers or len(output_layers) != 1:
            raise ValueError(
                f"{where}, target_modules match {len(input_layers)} and output_modules match {len(output_layers)} "
                "modules; an FFN has at least one input projection and exactly one output projection, side by side. "
                f"Make target_modules={config.target_modules} and output_modules={config.output_modules} "
                "(and exclude_modules, layers_to_transform) match both or neither"
            )
        if any(layer.out_features != output_layers[0].in_features for layer in input_layers):
            raise ValueError(
                f"{where}, the input projections give {[layer.out_features for layer in input_layers]} features and "
                f"the output projection takes {output_layers[0].in_features}; they must be equal, as only elementwise "
                "operations may stand between them"
            )
