"""A weaker expert: a share of its difference to the shared FFN."""

from __future__ import annotations

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .config import CLSRConfig
from .layer import CLSRLayer
from .quantized import dequantized_weight


@torch.no_grad()
def scale_expert(model: nn.Module, adapter_name: str, scale: float) -> None:
    """
    Keep a share of what an adapter changes, in place: weights between those of the base model and of the training.

    A trained expert can be worse than the base model on speech unlike that of its training. Weights between the two
    lose less there (docs/results/index.md; Wortsman et al., "Robust fine-tuning of zero-shot models", 2022). Gates
    stay as they are. Save the adapter afterwards, and measure it again. Two calls multiply.

    Args:
        model (`nn.Module`): A [`~peft.PeftModel`], or a model of transformers with adapters of its own `add_adapter`.
        adapter_name (`str`): The adapter.
        scale (`float`): The share, in [0, 1]: 0 is the base model, 1 changes nothing.

    Raises:
        ValueError: the model has no such adapter of CLSR; the share is outside [0, 1]; or a full expert stands on
            weights that are offloaded.

    Example:

    ```py
    >>> model, processor = load_with_experts("openai/whisper-base", ["runs/ca/ca"], ["ca"])
    >>> scale_expert(model, "ca", 0.5)
    >>> save_language(model, "runs/ca-half", "ca")
    ```
    """
    configs = getattr(model, "peft_config", None) or {}
    if not isinstance(configs.get(adapter_name), CLSRConfig):
        names = ", ".join(name for name, config in configs.items() if isinstance(config, CLSRConfig)) or "none"
        raise ValueError(f"the model has no expert {adapter_name!r}, expected one of its own: {names}")
    if not 0 <= scale <= 1:
        raise ValueError(f"scale is {scale}, expected a share in [0, 1]: 0.5 keeps half of the expert")
    pairs = [pair for module in model.modules() for pair in _changed(module, adapter_name)]
    if any(weight.is_meta for pair in pairs for weight in pair):
        raise ValueError(
            f"weights of adapter {adapter_name!r} or of the base model are offloaded: load the model without a "
            "device_map, scale the expert, and save it"
        )
    for weight, start in pairs:
        weight.copy_(torch.lerp(start.to(weight), weight, scale))


def _changed(module: nn.Module, adapter_name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The weights of an adapter in a module, each with the value at which it changes nothing."""
    if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
        copied = module.modules_to_save[adapter_name].parameters()
        return list(zip(copied, module.original_module.parameters(), strict=True))
    if not isinstance(module, CLSRLayer):
        return []
    if adapter_name in module.clsr_expert_B:
        weight = module.clsr_expert_B[adapter_name].get_parameter("weight")
        return [(weight, torch.zeros((), device=weight.device))]
    if adapter_name not in module.clsr_expert:
        return []
    expert, base = module.clsr_expert[adapter_name], module.get_base_layer()
    shared = base.get_parameter("weight")
    pairs = [(expert.get_parameter("weight"), shared if shared.is_meta else dequantized_weight(base))]
    return pairs if expert.bias is None else [*pairs, (expert.get_parameter("bias"), base.get_parameter("bias"))]
