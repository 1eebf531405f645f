"""The weights of quantized layers."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight


def dequantized_weight(layer: Any) -> torch.Tensor:
    """
    The weight of a linear layer [out, in], dequantized if it is of bitsandbytes or torchao. `layer` is not changed.

    PEFT's `dequantize_module_weight` is for layers of bitsandbytes that have not run. The first forward of an int8
    layer moves the scales from the weight to the layer's state. PEFT then replaces the weight by one without scales,
    and the layer is broken. The first inference of a 4-bit layer may pack its weight anew for a kernel of the CPU,
    which PEFT would read in the wrong order.
    """
    weight = layer.weight  # of an `nn.Linear`, or a class that stands for one
    kind = type(weight).__name__
    if kind == "Int8Params" and weight.dtype == torch.int8:
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = weight.SCB if layer.state.SCB is None else layer.state.SCB
        return int8_vectorwise_dequant(weight.data, scales.to(weight.device))
    if kind == "Params4bit" and getattr(weight.quant_state, "packing_format_for_cpu", False):
        from bitsandbytes import matmul_4bit

        units = torch.eye(layer.in_features, dtype=weight.quant_state.dtype)
        return matmul_4bit(units, weight, quant_state=weight.quant_state).T
    return dequantize_module_weight(layer)
