"""Gradient checkpointing that the budget loss can train through."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def avoid_reentrant_checkpointing(model: nn.Module) -> None:
    """
    Make gradient checkpointing non-reentrant, unless the caller asked for one of the two by name.

    PEFT's `prepare_model_for_kbit_training(model)` leaves the choice to torch, which takes the reentrant one. That has
    no graph in its forward pass, so the budget loss would not train the gates.
    """
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, partial) and function.func is checkpoint and "use_reentrant" not in function.keywords:
            setattr(module, "_gradient_checkpointing_func", partial(function, use_reentrant=False))  # noqa: B010
