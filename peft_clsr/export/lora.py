"""A LoRA of PEFT from frozen experts: an expert is the shared projection plus a difference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
        projections (`dict[str, LowRankExpert or FullExpert]`): Name in the base model to the expert's projection.
        adapter_name (`str`): The adapter.
        config (`CLSRConfig`): Its config.
        base_name (`str`, *optional*): Hub id or folder of the original base model.
        is_cut (`bool`): True if the adapter cut the context of the base.
    """

    projections: dict[str, Any]
    adapter_name: str
    config: CLSRConfig
    base_name: str | None
    is_cut: bool

    def save(self, model: WhisperForConditionalGeneration, folder: str | Path, rank: int | None) -> float:
        """Write the LoRA that turns the base into the frozen `model`. See [`FrozenRouting.save_as_lora`]."""
        if not self.projections:
            raise ValueError(
                "all modules are frozen as the shared FFN, so a LoRA would change nothing: use the base model"
            )
        rank = lora_rank(self.config, self.is_cut, rank)
        weights, error = self._low_rank() if self.config.expert_rank else self._approximate(rank)
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,  # scaling 1
            target_modules=list(self.projections),
            lora_bias=any(key.endswith(".bias") for key in weights),
            modules_to_save=self.config.modules_to_save and list(self.config.modules_to_save),
            revision=self.config.revision,
        )
        lora = _empty_lora(model, config, self.base_name)
        weights |= _saved_modules(lora, model)
        weights = {f"base_model.model.{key}": weight for key, weight in weights.items()}
        lora.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
        return error

    def _low_rank(self) -> tuple[dict[str, torch.Tensor], float]:
        """The weights of low-rank experts, by their keys in a LoRA, and their error, which is 0."""
        weights: dict[str, torch.Tensor] = {}
        for key, expert in self.projections.items():
            weights |= {f"{key}.lora_A.{_NAME}.weight": expert.A, f"{key}.lora_B.{_NAME}.weight": expert.B}
        return weights, 0.0

    def _approximate(self, rank: int) -> tuple[dict[str, torch.Tensor], float]:
        """The weights of full experts by PEFT's singular value decomposition, and their relative error."""
        names = {key: key.replace(".", "/") for key in self.projections}  # in a ModuleDict they have no dots
        experts = nn.ModuleDict({names[key]: expert for key, expert in self.projections.items()})
        _, converted = convert_to_lora(experts, rank)
        weights: dict[str, torch.Tensor] = {}
        missed = total = 0.0
        for key, expert in self.projections.items():
            A, B = (converted[f"{names[key]}.lora_{letter}.weight"] for letter in "AB")
            weights |= {f"{key}.lora_A.{_NAME}.weight": A, f"{key}.lora_B.{_NAME}.weight": B}
            difference = expert.get_delta_weight(_NAME)
            missed += float((difference - B @ A).square().sum())
            total += float(difference.square().sum())
        biases = {key: expert.bias_difference() for key, expert in self.projections.items()}
        if any(bool(bias.any()) for bias in biases.values()):
            weights |= {f"{key}.lora_B.{_NAME}.bias": bias for key, bias in biases.items()}
        return weights, (missed / total) ** 0.5 if total else 0.0


def lora_rank(config: CLSRConfig, is_cut: bool, rank: int | None) -> int:
    """
    The rank of the LoRA that an adapter becomes.

    Args:
        config (`CLSRConfig`): Its config.
        is_cut (`bool`): True if it cut the context of its base.
        rank (`int`, *optional*): The rank that is asked for. Full experts need one; low-rank ones have their own.

    Raises:
        ValueError: the adapter cannot become a LoRA, or not of this rank.
    """
    if is_cut:
        raise ValueError(
            f"the adapter cut the context to {config.max_audio_seconds:g} s, which a LoRA cannot carry: freeze it at "
            "the base's context, with config.max_audio_seconds = None (peft-clsr export --full_context), or save the "
            "whole model with frozen.model.save_pretrained()"
        )
    if config.expert_rank is None:
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(
                f"the rank of the LoRA is {rank}, expected at least 1: the experts are full ones, which a LoRA "
                "approximates; try 64, and measure it"
            )
        return rank
    if rank not in (None, config.expert_rank):
        raise ValueError(
            f"the rank of the LoRA is {rank}, but the experts have rank {config.expert_rank}, at which it is exact: "
            "leave it out"
        )
    return config.expert_rank


def expert_projection(layer: CLSRLayer, adapter_name: str) -> LowRankExpert | FullExpert:
    """The expert in a layer. Of a low-rank one, the layer's shared weight is not kept."""
    if adapter_name in layer.clsr_expert:
        return FullExpert(layer, adapter_name)
    A: Any = layer.clsr_expert_A[adapter_name]
    B: Any = layer.clsr_expert_B[adapter_name]
    return LowRankExpert(A.weight.detach(), B.weight.detach())


class LowRankExpert(NamedTuple):
    """The projection of a low-rank expert: A [rank, in_features] and B [out_features, rank]."""

    A: torch.Tensor
    B: torch.Tensor


class FullExpert(nn.Module, BaseTunerLayer):
    """The projection of a full expert, in the form that `convert_to_lora` takes."""

    base_layer: Any
    expert: Any

    def __init__(self, layer: CLSRLayer, adapter_name: str) -> None:
        super().__init__()
        self.base_layer, self.expert = layer.get_base_layer(), layer.clsr_expert[adapter_name]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The weight minus the shared one, float32 [out_features, in_features]."""
        return self.expert.weight.float() - self.base_layer.weight.float()

    @torch.no_grad()
    def bias_difference(self) -> torch.Tensor:
        """The bias minus the shared one, float32 [out_features]. Zeros if the projection has none."""
        if self.expert.bias is None:
            return torch.zeros(len(self.expert.weight))
        return self.expert.bias.float() - self.base_layer.bias.float()


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
