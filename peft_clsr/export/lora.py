"""A LoRA of PEFT from frozen experts: an expert is the shared projection plus a difference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import WhisperForConditionalGeneration

from ..tuner.config import CLSRConfig
from ..tuner.layer import CLSRLayer

_NAME = "default"  # PEFT saves an adapter of this name into the folder itself


@dataclass(frozen=True)
class FrozenExperts:
    """
    The modules of a frozen routing that became the expert, and what else its adapter says.

    Args:
        layers (`dict[str, CLSRLayer]`): Name in the base model to the layer that the plain one replaced.
        adapter_name (`str`): The adapter.
        config (`CLSRConfig`): Its config.
        base_name (`str`, *optional*): Hub id or folder of the original base model.
        cut_seconds (`float`, *optional*): The context in seconds, if the adapter cut it.
    """

    layers: dict[str, CLSRLayer]
    adapter_name: str
    config: CLSRConfig
    base_name: str | None
    cut_seconds: float | None

    def save(self, model: WhisperForConditionalGeneration, folder: str | Path, rank: int | None) -> float:
        """Write the LoRA that turns the base into the frozen `model`. See [`FrozenRouting.save_as_lora`]."""
        if not self.layers:
            raise ValueError(
                "all modules are frozen as the shared FFN, so a LoRA would change nothing: use the base model"
            )
        if self.cut_seconds is not None:
            raise ValueError(
                f"the adapter cut the context to {self.cut_seconds:g} s, which a LoRA cannot carry: freeze it at the "
                "base's context, with config.max_audio_seconds = None (peft-clsr export --full_context), or save the "
                "whole model with frozen.model.save_pretrained()"
            )
        if self.config.expert_rank is None:
            rank = self._check_rank(rank)
        elif rank not in (None, self.config.expert_rank):
            raise ValueError(
                f"rank is {rank}, but the experts have rank {self.config.expert_rank}, at which the LoRA is exact: "
                "leave rank out"
            )
        differences = {key: _Difference(layer, self.adapter_name) for key, layer in self.layers.items()}
        if rank is None or self.config.expert_rank is not None:
            rank = self.config.expert_rank
            pairs = {key: difference.low_rank() for key, difference in differences.items()}
            error = 0.0
        else:
            pairs = _approximate(differences, rank)
            error = _relative_error(differences, pairs)
        biases = {key: difference.bias() for key, difference in differences.items()}
        has_biases = any(bias is not None and bool(bias.any()) for bias in biases.values())
        lora = _empty_lora(
            model,
            LoraConfig(
                r=rank,
                lora_alpha=rank,  # scaling 1
                target_modules=list(self.layers),
                lora_bias=has_biases,
                modules_to_save=self.config.modules_to_save and list(self.config.modules_to_save),
                revision=self.config.revision,
            ),
            self.base_name,
        )
        weights = {}
        for key, (A, B) in pairs.items():
            weights |= {f"{key}.lora_A.{_NAME}.weight": A, f"{key}.lora_B.{_NAME}.weight": B}
            if has_biases:
                weights[f"{key}.lora_B.{_NAME}.bias"] = biases[key]
        weights |= _saved_modules(lora, model)
        weights = {f"base_model.model.{key}": weight for key, weight in weights.items()}
        lora.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
        return error

    def _check_rank(self, rank: int | None) -> int:
        highest = min(min(layer.in_features, layer.out_features) for layer in self.layers.values())
        if not isinstance(rank, int) or not 1 <= rank <= highest:
            raise ValueError(
                f"rank is {rank}, expected 1 to {highest}: the experts are full ones, so a LoRA of a lower rank is an "
                "approximation; try 64, and measure it"
            )
        return rank


class _Difference(nn.Module, BaseTunerLayer):
    """An expert minus the shared projection, in the form that `convert_to_lora` takes."""

    def __init__(self, layer: CLSRLayer, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = layer.get_base_layer()
        self.expert = layer.clsr_expert[adapter_name] if adapter_name in layer.clsr_expert else None
        if self.expert is None:
            self.A, self.B = layer.clsr_expert_A[adapter_name], layer.clsr_expert_B[adapter_name]

    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, in_features] and B [out_features, rank] of a low-rank expert."""
        return self.A.weight.detach(), self.B.weight.detach()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The difference of a full expert, float32 [out_features, in_features]."""
        return self.expert.weight.float() - self.base_layer.weight.float()

    @torch.no_grad()
    def bias(self) -> torch.Tensor | None:
        """The difference of the biases, float32 [out_features]. `None` if there is none: low-rank experts share it."""
        if self.expert is None or self.expert.bias is None:
            return None
        return self.expert.bias.float() - self.base_layer.bias.float()


def _approximate(differences: Mapping[str, _Difference], rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each full expert, by PEFT's singular value decomposition."""
    names = {key: key.replace(".", "/") for key in differences}  # a module's name in a ModuleDict has no dots
    _, weights = convert_to_lora(nn.ModuleDict({names[key]: module for key, module in differences.items()}), rank)
    return {key: (weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]) for key, name in names.items()}


def _relative_error(
    differences: Mapping[str, _Difference], pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> float:
    """The Frobenius norm of what B·A misses in all differences, divided by that of the differences."""
    missed, total = 0.0, 0.0
    for key, (A, B) in pairs.items():
        difference = differences[key].get_delta_weight("default")
        missed += float((difference - B @ A).square().sum())
        total += float(difference.square().sum())
    return (missed / total) ** 0.5 if total else 0.0


def _empty_lora(model: WhisperForConditionalGeneration, config: LoraConfig, base_name: str | None) -> PeftModel:
    """A LoRA without data, on a Whisper of the size of `model`."""
    with torch.device("meta"):
        base = WhisperForConditionalGeneration(model.config)
    base.name_or_path = base_name or ""
    return get_peft_model(base, config, adapter_name=_NAME, low_cpu_mem_usage=True)


def _saved_modules(lora: PeftModel, model: WhisperForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The weights of the `modules_to_save` of `lora`, by their keys in it, from the frozen `model`."""
    wrapped = (
        name for name, module in lora.get_base_model().named_modules() if isinstance(module, ModulesToSaveWrapper)
    )
    return {
        f"{name}.modules_to_save.{_NAME}.{key}": weight
        for name in wrapped
        for key, weight in model.get_submodule(name).state_dict().items()
    }
