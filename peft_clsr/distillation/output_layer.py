"""The output layer (`proj_out`), from decoder states to logits over the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def output_layer(model: nn.Module) -> nn.Module:
    """The output layer of a Whisper, also inside a `PeftModel`."""
    whisper = model.get_base_model() if hasattr(model, "get_base_model") else model
    return whisper.get_output_embeddings()


@contextmanager
def replaced_output_layer(
    model: nn.Module, forward: Callable[[torch.Tensor], Any]
) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """
    Call `forward` in place of the output layer, while in the block.

    `outputs.logits` is what `forward` returns. The call is inside the model's forward, where FSDP and DeepSpeed have
    gathered the layer's weight. Give the model no labels, or it computes a loss from these "logits".

    Args:
        model (`nn.Module`): A Whisper, or a `PeftModel` around one.
        forward (`Callable`): Takes decoder states [batch, tokens, hidden].

    Yields:
        `Callable`: the layer's own forward, from decoder states to logits [..., vocabulary].

    Example:

    ```py
    >>> with replaced_output_layer(model, lambda hidden_states: hidden_states):
    ...     states = model(input_features=features, decoder_input_ids=ids).logits
    ```
    """
    layer = output_layer(model)
    forward = torch.compiler.disable(forward)  # it differs in each call, and would be recompiled
    # In a model that is spread over devices, accelerate's hook moves weights and inputs, then calls `_old_forward`.
    name = "_old_forward" if hasattr(layer, "_hf_hook") else "forward"
    original_forward, is_of_class = getattr(layer, name), name not in layer.__dict__
    setattr(layer, name, forward)
    try:
        yield original_forward
    finally:
        if is_of_class:
            delattr(layer, name)
        else:
            setattr(layer, name, original_forward)
