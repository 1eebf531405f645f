"""The weights of quantized layers."""

from __future__ import annotations

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn


def dequantized_weight(layer: nn.Linear) -> torch.Tensor:
    """
    The weight of a linear layer [out, in], dequantized if bitsandbytes or torchao quantized it. `layer` is not changed.

    PEFT's `dequantize_module_weight` breaks an int8 layer of bitsandbytes that has run before: it replaces the weight
    by one whose scales are lost, since the first forward moves them from the weight to the layer's state.
    """
    weight = layer.weight
    if type(weight).__name__ != "Int8Params":
        return dequantize_module_weight(layer)
    if weight.dtype != torch.int8:
        return weight.data  # not quantized yet
    from bitsandbytes.functional import int8_vectorwise_dequant

    scales = weight.SCB if layer.state.SCB is None else layer.state.SCB
    return int8_vectorwise_dequant(weight.data, scales.to(weight.device))
