"""
State that the layers of a model share during a forward. These objects are neither modules nor buffers, so never saved.

- `FFNRoute`: the path of each token, passed from the input to the output projection of one FFN;
- `RoutingState`: settings and gate values of all FFNs of a model.

The state of a call or a forward is kept apart by thread (`calls`). `samples.use_adapter_per_sample` sets the adapter
of each sample.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..whisper import module_side
from .calls import Calls, PerThread

if TYPE_CHECKING:
    from .config import CLSRConfig


class TokenPaths:
    """
    The path of each token in a forward of one FFN.

    `paths` lists the paths of the FFN: `None` is the shared one, a string is an adapter. During a forward, exactly one
    of the following is set; between forwards, and where the adapter is off, none is.
    - `gate` float32 [..., 1]: soft; both paths are computed and blended.
    - `is_skipped`: soft; only the shared FFN is computed.
    - `choice` [...], an index into `paths`, boolean if there are two: hard; all paths are computed, one is selected.
    - `groups`, pairs of a path and the int64 indices of its tokens: hard; the input projections gather the tokens of
      each group, and the output projection puts them back in order. A single group takes all tokens in their order.
    """

    def __init__(self) -> None:
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


class FFNRoute:
    """
    What the projections of one FFN share. Its input projections pass the paths of the tokens to its output projection.

    Args:
        routing (`RoutingState`): The state of the model.
        name (`str`): Name of the module that owns the gate.
    """

    def __init__(self, routing: RoutingState, name: str) -> None:
        self.routing = routing
        self.name = name
        self._tokens = PerThread(TokenPaths)

    @property
    def tokens(self) -> TokenPaths:
        """The paths of the tokens in the running forward of this thread."""
        return self._tokens.get()

    def shared_samples(self, is_training: bool) -> list[bool] | None:
        """True for each sample whose tokens take the shared FFN here, as their decoder does; `None`: no sample."""
        shared = self.routing.calls.current(is_training).shared_decoder
        return shared if shared is not None and module_side(self.name) == "decoder" else None

    def start(self) -> TokenPaths:
        """Start a forward: no path is chosen yet."""
        return self._tokens.start()


class ForwardGates:
    """Gate values of a forward of the whole model that counts them, and afterwards their sums."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.values: list[tuple[str, torch.Tensor, CLSRConfig]] | None = None  # None: not counting
        self.trained: list[torch.Tensor] = []  # those that need a graph
        self.budget_loss: torch.Tensor | None = None
        self.sums: torch.Tensor | None = None  # [samples]; [1] if samples have no adapters of their own
        self.counts: torch.Tensor | None = None

    @property
    def is_set(self) -> bool:
        return self.values is not None or self.sums is not None


class RoutingState:
    """
    Settings and gate values shared by all routed layers of a model.

    It hooks the forward of the base model to add the budget loss. PEFT calls the tuner's forward for some task types
    and the base model directly for others; the hook works for both.
    """

    def __init__(self) -> None:
        self.gate_progress: float | None = None  # of the training, in [0, 1]
        self.full_positions: torch.Tensor | None = None  # [positions, hidden] of the encoder before an adapter cut it
        self.route_by_language = True
        self._hooks: list[Any] = []
        self._start()

    def _start(self) -> None:
        self.calls = Calls()
        self.warned_of: set[str] = set()  # languages of which a warning has told
        self._forward_gates = PerThread(ForwardGates)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "gate_progress": self.gate_progress,
            "full_positions": self.full_positions,
            "route_by_language": self.route_by_language,
            "_hooks": self._hooks,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start()
        self.__dict__.update(state)

    @property
    def adapter_names(self) -> list[str] | None:
        """The adapter of each sample in the running call; `None`: the active adapter."""
        return self.calls.current().adapter_names

    @property
    def forward_gates(self) -> ForwardGates:
        """The gates of this thread's last forward."""
        return self._forward_gates.get()

    def attach(self, model: nn.Module, checks: Callable) -> None:
        """
        Hook the forward of the base model, also with `checks`, and set `model.clsr_routing` for its `generate`; once.
        """
        if not self._hooks:
            model.clsr_routing = self
            self._hooks = [
                model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                model.register_forward_hook(self._after_forward, with_kwargs=True),
                model.register_forward_hook(checks),
            ]

    def detach(self, model: nn.Module) -> None:
        """Undo `attach`."""
        model.__dict__.pop("clsr_routing", None)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._start()

    @property
    def is_collecting(self) -> bool:
        """True if gate values are recorded or counted in this forward."""
        return self.calls.current().recorded is not None or self.forward_gates.values is not None

    def add_gate_values(
        self, name: str, gate_values: torch.Tensor, config: CLSRConfig, is_trained: bool, counts: bool = True
    ) -> None:
        """
        Store the gate values of a module, if they are asked for.

        Args:
            name (`str`): Name of the module.
            gate_values (`torch.Tensor`): [batch, tokens] in [0, 1] (leading dimensions of the FFN's input).
            config (`CLSRConfig`): The adapter's.
            is_trained (`bool`): True if the gate's weights require a gradient.
            counts (`bool`, *optional*, defaults to `True`): False if the values are no part of the budget.
        """
        recorded, gates = self.calls.current().recorded, self.forward_gates
        if recorded is not None:
            recorded[name] = gate_values.detach()
        if gates.values is not None and counts:
            # Store only. Any op here would break checkpoint recomputation.
            gates.values.append((name, gate_values, config))
            if is_trained:
                gates.trained.append(gate_values)

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        gates = self._forward_gates.start()
        if module.training or self._find_labels(module, args, kwargs) is not None:
            gates.values = []

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> Any:
        """Compute the sums of the gate values and the budget loss, and in training add it to the loss."""
        gates = self.forward_gates
        gate_values_of_modules, gates.values = (
            gates.values,
            None,
        )  # a recomputation in the backward pass must not count
        if not gate_values_of_modules:
            return None
        if module.training and torch.is_grad_enabled() and not all(gate.requires_grad for gate in gates.trained):
            if self._find_labels(module, args, kwargs) is None:
                return None  # no loss to add to; `budget_loss()` raises
            raise RuntimeError(
                "gates were computed without a graph, so the budget loss would not train them: this happens under "
                "gradient checkpointing with use_reentrant=True. Use gradient_checkpointing_kwargs="
                '{"use_reentrant": False} in TrainingArguments, gradient_checkpointing_enable or '
                "prepare_model_for_kbit_training"
            )
        gates.trained = []
        inputs = _named_inputs(module, args, kwargs)
        has_labels = inputs.get("labels") is not None
        inputs = {**inputs, "labels": self._find_labels(module, args, kwargs)}
        is_encoder_decoder = bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
        config, device = gate_values_of_modules[0][2], gate_values_of_modules[0][1].device
        adapter_names, shared_decoder = self.adapter_names, self.calls.current().shared_decoder
        samples = 1 if adapter_names is None else len(adapter_names)
        sums, counts = torch.zeros(samples, device=device), torch.zeros(samples, device=device)
        for name, gate_values, _ in gate_values_of_modules:
            mask = _token_mask(name, gate_values, is_encoder_decoder, inputs)
            mask = torch.ones_like(gate_values) if mask is None else mask
            if shared_decoder is not None and module_side(name) == "decoder":
                mask = keep_routed(mask, shared_decoder)
            sums = sums + (gate_values * mask).reshape(samples, -1).sum(dim=1).to(device)
            counts = counts + mask.reshape(samples, -1).sum(dim=1).to(device)
        gates.sums, gates.counts = sums, counts
        if adapter_names is not None and len(set(adapter_names)) > 1:
            return None  # each language has a budget of its own
        gates.budget_loss = (sums.sum() / counts.sum().clamp(min=1) - config.gate_budget).abs()
        if not module.training:
            return None
        return _add_to_loss(outputs, config.budget_weight * gates.budget_loss, has_labels)

    def _find_labels(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
        labels = self.calls.current().labels
        return labels if labels is not None else _named_inputs(module, args, kwargs).get("labels")


def keep_routed(values: torch.Tensor, shared: list[bool]) -> torch.Tensor:
    """`values` [..., tokens], 0 for the tokens of `shared` samples. Those of a sample's beams are contiguous."""
    is_routed = torch.tensor([not one for one in shared], device=values.device).unsqueeze(-1)
    return (values.reshape(len(shared), -1) * is_routed).view(values.shape)


def _named_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name."""
    if not args:
        return kwargs
    return inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments


def _token_mask(
    name: str, gate_values: torch.Tensor, is_encoder_decoder: bool, inputs: dict[str, Any]
) -> torch.Tensor | None:
    """
    The mask of a module's tokens, 1 for a token and 0 for padding, in the shape and dtype of `gate_values`.

    `None` if the inputs of the forward have no mask that fits.
    """
    if is_encoder_decoder and module_side(name) == "decoder":
        if inputs.get("labels") is not None:
            mask = inputs["labels"] != -100
        else:
            mask = inputs.get("decoder_attention_mask")
    else:
        mask = inputs.get("attention_mask")
        if mask is not None and gate_values.dim() == 2 and 0 < gate_values.shape[1] < mask.shape[-1]:
            # A mask of audio frames. Architectures differ in how many frames their convolutions merge into a token
            # (Whisper 2, Speech2Text 4), so the stride comes from the shapes.
            stride = -(-mask.shape[-1] // gate_values.shape[1])
            mask = mask[:, ::stride]
    if mask is None or mask.numel() != gate_values.numel():
        return None
    return mask.reshape(gate_values.shape).to(gate_values)


def _add_to_loss(outputs: Any, extra: torch.Tensor, has_labels: bool) -> Any:
    """Add `extra` to the loss in a model's `outputs`, if they have one."""
    if isinstance(outputs, dict):  # a ModelOutput is one
        if outputs.get("loss") is not None:
            outputs["loss"] = outputs["loss"] + extra.to(outputs["loss"].device)
    elif isinstance(outputs, tuple) and has_labels:
        outputs = (outputs[0] + extra.to(outputs[0].device), *outputs[1:])
    return outputs
