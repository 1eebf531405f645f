"""What the routed modules tell each other and the model: no module and no buffer, so nothing of it is ever saved."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .config import CLSRConfig


class FFNRoute:
    """
    Carries the choice of one FFN from its input projections to its output projection.

    `paths` are those that the FFN has: `None` for the shared one, and names of adapters. Exactly one of the following
    describes a choice among them, and none does between forwards or where the adapter is off.
    - `gate` float32 [..., 1]: soft, both paths of an adapter are computed and blended;
    - `is_skipped`: soft, the shared FFN alone is computed;
    - `choice` [...], an index into `paths`, or boolean where there are two: hard, all paths are computed and selected;
    - `groups`, paths with the indices of their tokens, int64: hard, the input projections gather each group and take
      it by its path; the output projection puts tokens back. A single group takes all tokens as they come.

    Args:
        routing (`RoutingState`): The model's.
        name (`str`): Name of the module that owns the gate.
    """

    def __init__(self, routing: RoutingState, name: str) -> None:
        self.routing = routing
        self.name = name
        self.clear()

    def clear(self) -> None:
        self.gate: torch.Tensor | None = None
        self.is_skipped = False
        self.choice: torch.Tensor | None = None
        self.paths: list[str | None] = []
        self.groups: list[tuple[str | None, torch.Tensor | None]] = []

    @property
    def is_soft(self) -> bool:
        return self.gate is not None or self.is_skipped

    @property
    def is_set(self) -> bool:
        return self.is_soft or self.choice is not None or bool(self.groups)

    def __getstate__(self) -> dict[str, Any]:
        # Tensors with a graph can be neither copied nor pickled, and mean nothing outside of their forward.
        return {"routing": self.routing, "name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


class RoutingState:
    """
    What all routed modules of a model share: the schedule, the recorder, and the budget loss.

    It hooks the base model's forward, so that the budget loss is there by whatever door the model is called: PEFT
    calls the tuner's own forward for some task types, and goes straight to the base model for others.
    """

    def __init__(self) -> None:
        self.gate_progress: float | None = None  # of the training, in [0, 1]
        self.recorded: dict[str, torch.Tensor] | None = None
        self.adapter_names: list[str] | None = None  # of each sample; None: the active adapter
        self.labels: torch.Tensor | None = None  # of a batch whose forward is not given them
        self.full_positions: torch.Tensor | None = None  # [positions, hidden] of the encoder, where an adapter cut it
        self.route_by_language = True
        self._hooks: list[Any] = []
        self._forget()

    def _forget(self) -> None:
        self._gates: list[tuple[str, torch.Tensor, CLSRConfig]] | None = None  # None: nobody collects
        self._trained: list[torch.Tensor] = []  # those of them that need a graph
        self.budget_loss: torch.Tensor | None = None
        self.gate_sums: torch.Tensor | None = None  # [samples], or [1] where samples have no adapters of their own
        self.gate_counts: torch.Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {
            "gate_progress": self.gate_progress,
            "full_positions": self.full_positions,
            "route_by_language": self.route_by_language,
            "_hooks": self._hooks,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.recorded = self.adapter_names = self.labels = None
        self._forget()
        self.__dict__.update(state)

    def attach(self, model: nn.Module) -> None:
        """Hook the forward of the base model, and let its `generate` find this; once."""
        if not self._hooks:
            model.clsr_routing = self
            self._hooks = [
                model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                model.register_forward_hook(self._after_forward, with_kwargs=True),
            ]

    def detach(self, model: nn.Module) -> None:
        """Leave the base model as it was."""
        model.__dict__.pop("clsr_routing", None)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._forget()

    @property
    def listens(self) -> bool:
        """Whether anybody asks for gate values."""
        return self.recorded is not None or self._gates is not None

    def add(self, name: str, gate_values: torch.Tensor, config: CLSRConfig, trains: bool) -> None:
        """
        A module's choice.

        Args:
            name (`str`): Name of the module.
            gate_values (`torch.Tensor`): [batch, tokens] in [0, 1] (leading dimensions of the FFN's input).
            config (`CLSRConfig`): The adapter's.
            trains (`bool`): Whether the gate's weights require a gradient.
        """
        if self.recorded is not None:
            self.recorded[name] = gate_values.detach()
        if self._gates is not None:
            # Only kept: an operation here would be one of a checkpointed region, and not be met in its recomputation.
            self._gates.append((name, gate_values, config))
            if trains:
                self._trained.append(gate_values)

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._forget()
        if module.training or self._labels(module, args, kwargs) is not None:
            self._gates = []

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> Any:
        gates, self._gates = self._gates, None  # a recomputation in the backward pass must not be counted
        if not gates:
            return None
        if module.training and torch.is_grad_enabled() and not all(gate.requires_grad for gate in self._trained):
            if self._labels(module, args, kwargs) is None:
                return None  # there is no loss to add to, and `budget_loss()` says that there is none
            raise RuntimeError(
                "gates were computed without a graph, so the budget loss would not train them: this happens under "
                "gradient checkpointing with use_reentrant=True. Use gradient_checkpointing_kwargs="
                '{"use_reentrant": False}'
            )
        self._trained = []
        inputs = _named_inputs(module, args, kwargs)
        has_labels = inputs.get("labels") is not None
        inputs = {**inputs, "labels": self._labels(module, args, kwargs)}
        is_encoder_decoder = bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
        config, device = gates[0][2], gates[0][1].device
        samples = 1 if self.adapter_names is None else len(self.adapter_names)
        sums, counts = torch.zeros(samples, device=device), torch.zeros(samples, device=device)
        for name, gate_values, _ in gates:
            mask = _token_mask(name, gate_values, is_encoder_decoder, inputs)
            mask = torch.ones_like(gate_values) if mask is None else mask
            sums = sums + (gate_values * mask).reshape(samples, -1).sum(dim=1).to(device)
            counts = counts + mask.reshape(samples, -1).sum(dim=1).to(device)
        self.gate_sums, self.gate_counts = sums, counts
        if self.adapter_names is not None and len(set(self.adapter_names)) > 1:
            return None  # several languages have no one budget
        self.budget_loss = (sums.sum() / counts.sum().clamp(min=1) - config.gate_budget).abs()
        if not module.training:
            return None
        return _add_to_loss(outputs, config.budget_weight * self.budget_loss, has_labels)

    def _labels(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
        return self.labels if self.labels is not None else _named_inputs(module, args, kwargs).get("labels")


def _named_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a forward was called with, by name."""
    if not args:
        return kwargs
    return inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments


def _token_mask(
    name: str, gate_values: torch.Tensor, is_encoder_decoder: bool, inputs: dict[str, Any]
) -> torch.Tensor | None:
    """Which tokens of a module are no padding: float [batch, tokens] as `gate_values`, or `None` where not known."""
    if is_encoder_decoder and "decoder" in name.split("."):
        if inputs.get("labels") is not None:
            mask = inputs["labels"] != -100
        else:
            mask = inputs.get("decoder_attention_mask")
    else:
        mask = inputs.get("attention_mask")
        if mask is not None and gate_values.dim() == 2 and 0 < gate_values.shape[1] < mask.shape[-1]:
            # Frames of audio; the encoder's convolutions make one token of every `stride` frames.
            stride = -(-mask.shape[-1] // gate_values.shape[1])
            mask = mask[:, ::stride]
    if mask is None or mask.numel() != gate_values.numel():
        return None
    return mask.reshape(gate_values.shape).to(gate_values)


def _add_to_loss(outputs: Any, extra: torch.Tensor, has_labels: bool) -> Any:
    """`outputs` with `extra` on their loss, where they have one."""
    if isinstance(outputs, dict):  # a ModelOutput is one
        if outputs.get("loss") is not None:
            outputs["loss"] = outputs["loss"] + extra.to(outputs["loss"].device)
    elif isinstance(outputs, tuple) and has_labels:
        outputs = (outputs[0] + extra.to(outputs[0].device), *outputs[1:])
    return outputs
