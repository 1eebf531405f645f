"""The teacher's decoder states, its output layer, and a hash of its weights."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from ..output_layer import output_layer, replaced_output_layer

# Config fields that change what a Whisper with the same weights computes.
_CONFIG = (
    "activation_function",
    "scale_embedding",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "pad_token_id",
    "decoder_start_token_id",
)


@torch.no_grad()
def teacher_decoder_states(
    teacher: nn.Module,
    input_features: torch.Tensor,
    labels: torch.Tensor,
    decoder_input_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The teacher's last decoder states, before its output layer, at each label position.

    From the state at a position the teacher predicts that position's label; it has read the labels before it. Put the
    teacher into evaluation mode first.

    Args:
        teacher (`nn.Module`): A Whisper, or a `PeftModel` around one.
        input_features (`torch.Tensor`): [batch, mels, frames], the teacher's. They are not changed.
        labels (`torch.Tensor`): int64 [batch, tokens] in the teacher's vocabulary, -100 for padding.
        decoder_input_ids (`torch.Tensor`, *optional*):
            int64 [batch, tokens] in the teacher's vocabulary, read by the decoder. By default, `labels` shifted right.

    Returns:
        `torch.Tensor`: [batch, tokens, hidden] in the teacher's precision, on the device of `labels`.
    """
    whisper = _whisper(teacher)
    if decoder_input_ids is None:
        start = whisper.config.decoder_start_token_id
        decoder_input_ids = shift_tokens_right(labels, whisper.config.pad_token_id, start)
    # Always a copy: Whisper's SpecAugment writes into its input.
    input_features = input_features.to(_device(whisper), whisper.dtype, copy=True)
    with replaced_output_layer(whisper, lambda hidden_states: hidden_states):
        outputs = whisper(
            input_features=input_features, decoder_input_ids=decoder_input_ids.to(_device(whisper)), use_cache=False
        )
    return outputs.logits.to(labels.device)


@torch.no_grad()
def teacher_output_layer(teacher: nn.Module) -> nn.Linear:
    """
    A frozen copy of the teacher's output layer as a plain linear layer, from decoder states to logits.

    Args:
        teacher (`nn.Module`): A Whisper, or a `PeftModel` around one, whose output layer may be quantized or adapted.

    Returns:
        `nn.Linear`: hidden to vocabulary, on the CPU, in the teacher's precision.
    """
    layer, whisper = output_layer(teacher), _whisper(teacher)
    is_plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and not layer.weight.is_meta
    if is_plain:
        weight, bias = layer.weight, layer.bias
    else:
        # Quantized, adapted or offloaded, it is still linear: its outputs for unit vectors are its weight.
        units = torch.eye(whisper.config.d_model, dtype=whisper.dtype, device=_device(whisper))
        bias = layer(torch.zeros_like(units[:1]))[0]
        weight = (layer(units) - bias).T
        bias = bias if bias.any() else None
    return linear_layer(weight, bias)


def linear_layer(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """A frozen linear layer with a copy of `weight` [out, in] and `bias` [out], on the CPU."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
            setattr(layer, name, nn.Parameter(copy, requires_grad=False))
    return layer


def teacher_hash(teacher: nn.Module) -> str:
    """
    A hash of the teacher's weights, bit for bit, and of the config and adapters that decide how they are used.

    Args:
        teacher (`nn.Module`): A Whisper, or a `PeftModel` around one; quantized or offloaded ones too.

    Returns:
        `str`: 32 hexadecimal digits (XXH3).
    """
    import xxhash  # installed with datasets

    whisper = _whisper(teacher)
    digest = xxhash.xxh3_128(repr([getattr(whisper.config, name) for name in _CONFIG]).encode())
    for name, module in whisper.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            state = module.disable_adapters, module.active_adapters, getattr(module, "scaling", None)
            digest.update(repr((name, *state)).encode())
    offloaded = any(parameter.is_meta for parameter in whisper.parameters())
    tensors = get_state_dict_offloaded_model(whisper) if offloaded else whisper.state_dict()
    for name in sorted(tensors):
        _update(digest, name, tensors[name])
    return digest.hexdigest()


def _update(digest: Any, name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        digest.update(repr((name, value)).encode())
    elif hasattr(value, "__tensor_flatten__"):  # a quantized tensor: a wrapper of plain ones
        parts, metadata = value.__tensor_flatten__()
        digest.update(repr((name, type(value).__name__, metadata)).encode())
        for part in parts:
            _update(digest, part, getattr(value, part))
    else:
        digest.update(repr((name, value.dtype, tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _whisper(teacher: nn.Module) -> nn.Module:
    """The Whisper itself, with the layers of a `PeftModel`'s adapters in it."""
    return teacher.get_base_model() if hasattr(teacher, "get_base_model") else teacher


def _device(whisper: nn.Module) -> torch.device | None:
    """Device of the inputs; `None` if the first weights are offloaded, because accelerate then moves the inputs."""
    return None if whisper.device.type == "meta" else whisper.device
