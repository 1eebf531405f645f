"""The adapter that an export keeps."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import WhisperForConditionalGeneration

from ..languages.adapters import adapter_of_language
from ..languages.tags import language_tag
from ..tuner.model import CLSRModel
from .plain_ffn import routed_projections

logger = logging.getLogger(__name__)


def find_adapter(model: Any, language: str) -> tuple[str, str]:
    """
    The name of a language's adapter, and the language's tag. Raises errors for a model without CLSR adapters.

    Warns of what no export keeps.
    """
    if not isinstance(model, PeftModel) or not isinstance(model.get_base_model(), WhisperForConditionalGeneration):
        inside = f" around a {type(model.get_base_model()).__name__}" if isinstance(model, PeftModel) else ""
        raise TypeError(
            f"the model is a {type(model).__name__}{inside}, expected a PeftModel around a "
            "WhisperForConditionalGeneration: load the adapter with PeftModel.from_pretrained(whisper, ...)"
        )
    if not isinstance(model.base_model, CLSRModel):
        configs: dict[str, Any] = dict(model.peft_config)
        kinds = ", ".join(f"{name} ({config.peft_type.value})" for name, config in configs.items())
        raise ValueError(
            f"the model has no CLSR layers to freeze, its adapters are: {kinds}. Merge those of other methods with "
            "model.merge_and_unload()"
        )
    name = adapter_of_language(model.peft_config, language)
    config: Any = model.peft_config[name]
    if config.translate_with_shared_decoder:
        logger.warning(
            f"the adapter {name!r} has translate_with_shared_decoder, which an export does not keep: when it "
            "translates, its decoder takes the expert, too. Translate with PyTorch, or with the base model"
        )
    return name, config.language or language_tag(language)


def check_layers(model: Any, adapter_name: str) -> None:
    """Raise a `ValueError` for FFNs that are quantized or not in memory."""
    for projections in routed_projections(model.get_base_model(), adapter_name).values():
        for key, layer in projections.items():
            base_layer: Any = layer.base_layer
            weight = base_layer.weight.detach()
            if type(base_layer) is not nn.Linear or type(weight) is not torch.Tensor or weight.is_meta:
                kind = "on the meta device" if weight.is_meta else f"a {type(base_layer).__name__} of {weight.dtype}"
                raise ValueError(
                    f"the shared projection {key!r} is {kind}, expected an nn.Linear with its weight in memory: load "
                    "the base model without quantization and offloading, and the adapter onto it"
                )


def copy_with_adapter(model: Any, adapter_name: str) -> PeftModel:
    """A copy in evaluation mode that has only one adapter, which is active."""
    model = copy.deepcopy(model)
    model.base_model.enable_adapter_layers()
    model.set_adapter(adapter_name)
    for other in set(model.peft_config) - {adapter_name}:
        model.delete_adapter(other)
    return model.eval()
