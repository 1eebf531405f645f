"""Warnings about a training that does not do what its adapter's config asks for. Each is given once for a model."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..whisper import module_side
from .layer import CLSRLayer

if TYPE_CHECKING:
    from .route import RoutingState


class TrainingChecks:
    """
    A forward hook of the base model. It warns of gate noise that nobody schedules, of frozen encoder experts, and of a
    backward pass in evaluation mode.

    Args:
        routing (`RoutingState`): The state of the model.
    """

    def __init__(self, routing: RoutingState) -> None:
        self.routing = routing
        self._checked: set[str] = set()  # adapters
        self._warned: set[str] = set()

    def __call__(self, model: nn.Module, args: tuple, outputs: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if not model.training:
            self._check_backward(outputs)
            return
        layers = (module for module in model.modules() if isinstance(module, CLSRLayer) and module.owns_gate)
        name = next((name for layer in layers for name in layer.routed_adapters()), None)
        if name is None or name in self._checked:
            return
        self._checked.add(name)
        layers = (module for module in model.modules() if isinstance(module, CLSRLayer) and module.owns_gate)
        gates = [layer for layer in layers if name in layer.clsr_config]
        is_frozen = {gate.route.name: gate.is_frozen(name) for gate in gates}
        if all(is_frozen.values()):
            return  # the adapter is not trained
        gate_noise = gates[0].clsr_config[name].gate_noise
        if self.routing.gate_progress is None and gate_noise:
            self._warn(
                "noise",
                f"adapter {name!r} trains without the gate noise that its config asks for (gate_noise="
                f"{gate_noise:g}), because nothing sets the progress of training: add "
                "callbacks=[GateScheduleCallback()] to the Trainer, or call set_gate_progress(model, step / steps) in "
                "your own loop; gate_noise=0 trains without noise",
            )
        if any(frozen for module, frozen in is_frozen.items() if module_side(module) == "encoder"):
            self._warn(
                "frozen",
                f"the encoder's experts of adapter {name!r} are frozen, as the encoder is. They stay as they are: "
                "those of a new adapter are copies of the shared FFNs, which only cost memory. Leave them out with "
                'CLSRConfig(exclude_modules=r".*encoder.*"), or, to train them, freeze the encoder before the adapter '
                "is added",
            )

    def _check_backward(self, outputs: Any) -> None:
        """Warn if there is a backward pass through `outputs`, which were computed in evaluation mode."""
        values = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple) else ()
        for value in values:
            if isinstance(value, torch.Tensor) and value.requires_grad:
                value.register_hook(self._warn_of_evaluation_mode)
                return

    def _warn_of_evaluation_mode(self, gradient: torch.Tensor) -> None:
        self._warn(
            "evaluation",
            "a backward pass through a model in evaluation mode does not train the gates of its CLSR adapter: call "
            "model.train() before training",
        )

    def _warn(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(message, stacklevel=3)
