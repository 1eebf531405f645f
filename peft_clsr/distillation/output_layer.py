"""Whisper's output layer (`proj_out`), which turns decoder states into logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def output_layer(model: nn.Module) -> nn.Module:
    """Return the output layer of a Whisper, also of one inside a `PeftModel`."""
    whisper = model.get_base_model() if hasattr(model, "get_base_model") else model
    return whisper.get_output_embeddings()


@contextmanager
def replaced_output_layer(
    model: nn.Module, forward: Callable[[torch.Tensor], Any]
) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """
    In the block, the model calls `forward` with its decoder states instead of its output layer.

    `outputs.logits` is the result of `forward`. It runs inside the model's forward, where FSDP and DeepSpeed have
    gathered the layer's weight. Give the model no labels: it would compute a loss from these "logits".

    Args:
        model (`nn.Module`): A Whisper, or a `PeftModel` around one.
        forward (`Callable`): Takes decoder states [batch, tokens, hidden].

    Yields:
        `Callable`: the layer's original forward, from decoder states to logits [batch, tokens, vocabulary].

    Example:

    ```py
    >>> with replaced_output_layer(model, lambda hidden_states: hidden_states):
    ...     states = model(input_features=features, decoder_input_ids=ids).logits
    ```
    """
    layer = output_layer(model)
    forward = torch.compiler.disable(forward)  # another function each call would be compiled each time
    # The hooks of accelerate (for a model spread over devices) move weights and inputs, then call `_old_forward`.
    name = "_old_forward" if hasattr(layer, "_hf_hook") else "forward"
    original, is_of_class = getattr(layer, name), name not in layer.__dict__
    setattr(layer, name, forward)
    try:
        yield original
    finally:
        if is_of_class:
            delattr(layer, name)
        else:
            setattr(layer, name, original)
