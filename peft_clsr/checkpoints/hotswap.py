"""Hot-swapping with `peft.utils.hotswap`: replaces an adapter's weights by another language's, in place."""

from __future__ import annotations

import functools
import re

import torch
from peft import PeftType
from peft.utils import hotswap
from torch import nn

from ..tuner.config import CLSRConfig
from ..tuner.layer import CLSRLayer

# Fields of the config that go with the weights: those that inference reads, and `started_from`.
_FIELDS_OF_LANGUAGE = ("language", "prompt_language", "translate_with_shared_decoder", "started_from")


def register_hotswap() -> None:
    """
    Make PEFT's `hotswap_adapter` take CLSR adapters.

    PEFT 0.21 admits a tuner by an entry in `CONFIG_KEYS_TO_CHECK`, but swaps as LoRA needs it: with ranks and scalings
    from the config, and zeros for layers that the new adapter lacks. Zeros change nothing in LoRA. In CLSR they would
    be a gate that always takes an expert of zeros. So CLSR adapters are swapped by `_swap`.
    """
    swap_lora = hotswap.hotswap_adapter_from_state_dict

    @functools.wraps(swap_lora)
    def hotswap_adapter_from_state_dict(model, state_dict, adapter_name, config, *args, **kwargs):
        swap = _swap if config.peft_type == PeftType.CLSR else swap_lora
        return swap(model, state_dict, adapter_name, config, *args, **kwargs)

    hotswap.hotswap_adapter_from_state_dict = hotswap_adapter_from_state_dict
    hotswap.CONFIG_KEYS_TO_CHECK[PeftType.CLSR] = ["expert_rank", "gate_dim", "max_audio_seconds"]


@torch.no_grad()
def _swap(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor],
    adapter_name: str,
    config: CLSRConfig,
    parameter_prefix: str = "clsr_",
) -> None:
    """
    Copy all weights of an adapter from `state_dict` in place. A compiled model so stays compiled. Its language, and
    how that is decoded, come from `config`.

    Raises:
        RuntimeError: names or shapes differ from those of the model's adapter. Nothing has been changed then.
    """
    of_adapter = re.compile(rf"\.{parameter_prefix}\w+\.{re.escape(adapter_name)}\.")
    own = {
        name.removeprefix("_orig_mod."): parameter  # of torch.compile(model)
        for name, parameter in model.named_parameters()
        if of_adapter.search(name)
    }
    own_shapes = {name: parameter.shape for name, parameter in own.items()}
    new_shapes = {name: tensor.shape for name, tensor in state_dict.items()}
    if own_shapes != new_shapes:
        differing = sorted(set(own_shapes.items()) ^ set(new_shapes.items()))
        raise RuntimeError(
            f"the weights to swap in do not fit adapter {adapter_name!r}: names or shapes differ, as of "
            f"{differing[0][0]!r}. Swap adapters of the same base model with the same layers and sizes, or load this "
            "one beside the other with load_adapter()"
        )
    for name, parameter in own.items():
        parameter.copy_(state_dict[name])
    for layer in model.modules():
        if isinstance(layer, CLSRLayer) and adapter_name in layer.clsr_config:
            for field in _FIELDS_OF_LANGUAGE:
                setattr(layer.clsr_config[adapter_name], field, getattr(config, field))
