"""
The two projections of a feed-forward network (FFN), each with the shared weight and an expert's.

`soft_routing` computes them in training, `hard_routing` in evaluation and where the adapter is frozen; a projection by
one path is in `expert`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from . import hard_routing, soft_routing
from .config import CLSRConfig
from .gate import GateLinear, gate_logits
from .quantized import dequantized_weight
from .route import FFNRoute
from .zero_gradients import with_zero_gradients

MERGE_ERROR = (
    "a CLSR adapter cannot be merged: each token is routed to the shared FFN or to the expert, which no single weight "
    "can do. Use the model with its adapter (hard routing costs about as much as the base model), save_pretrained() "
    "for the adapter alone, unload() for the unchanged base model, or peft_clsr.freeze_routing() for a plain Whisper "
    "of one language, which measures what freezing costs"
)


class CLSRLayer(BaseTunerLayer):
    """A projection of an FFN with the gates and experts of its adapters."""

    # All names of layers that may contain adapter (trainable) weights
    adapter_layer_names = ("clsr_gate_in", "clsr_gate_out", "clsr_expert", "clsr_expert_A", "clsr_expert_B")
    # All names of other parameters that may contain adapter-related parameters
    other_param_names = ("clsr_config",)
    # `peft.helpers.disable_input_dtype_casting` sets this to False
    cast_input_dtype_enabled: bool = True

    def __init__(self, base_layer: nn.Linear, route: FFNRoute, owns_gate: bool) -> None:
        self.base_layer = base_layer
        self.route = route
        self.owns_gate = owns_gate
        self.clsr_config: dict[str, CLSRConfig] = {}
        self.clsr_gate_in = nn.ModuleDict({})
        self.clsr_gate_out = nn.ModuleDict({})
        self.clsr_expert = nn.ModuleDict({})
        self.clsr_expert_A = nn.ModuleDict({})
        self.clsr_expert_B = nn.ModuleDict({})
        self._disable_adapters = False
        self._offloaded: set[str] = set()  # adapters on the CPU until a forward uses them
        self.merged_adapters = []

        self.in_features = self.get_base_layer().in_features
        self.out_features = self.get_base_layer().out_features

    def update_layer(self, adapter_name: str, config: CLSRConfig) -> None:
        if self.owns_gate:
            self.clsr_gate_in[adapter_name] = GateLinear(self.in_features, config.gate_dim)
            self.clsr_gate_out[adapter_name] = GateLinear(config.gate_dim, 1, bias=False)
        if config.expert_rank is None:
            has_bias = self.get_base_layer().bias is not None
            self.clsr_expert[adapter_name] = nn.Linear(self.in_features, self.out_features, bias=has_bias)
        else:
            self.clsr_expert_A[adapter_name] = nn.Linear(self.in_features, config.expert_rank, bias=False)
            self.clsr_expert_B[adapter_name] = nn.Linear(config.expert_rank, self.out_features, bias=False)
        self.clsr_config[adapter_name] = config
        self.reset_clsr_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self.train(self.base_layer.training)  # new modules are in training mode, and the base may not be

    @torch.no_grad()
    def reset_clsr_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """
        Set every gate logit to 0 and, with `init_weights`, the expert to the shared projection: the adapter then
        changes nothing.
        """
        if adapter_name in self.clsr_gate_in:
            nn.init.normal_(self.clsr_gate_in[adapter_name].weight, std=0.01)
            nn.init.zeros_(self.clsr_gate_in[adapter_name].bias)
            nn.init.zeros_(self.clsr_gate_out[adapter_name].weight)
        if not init_weights:
            return
        if adapter_name in self.clsr_expert_B:
            nn.init.zeros_(self.clsr_expert_B[adapter_name].weight)
        if adapter_name in self.clsr_expert:
            base_layer, expert = self.get_base_layer(), self.clsr_expert[adapter_name]
            if base_layer.weight.is_meta or expert.weight.is_meta:
                return  # low_cpu_mem_usage: the weights come from a file
            # Dequantizes the weights of bitsandbytes and torchao; others stay as they are.
            expert.weight.copy_(dequantized_weight(base_layer))
            if expert.bias is not None:
                expert.bias.copy_(base_layer.bias)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        check_one_adapter(adapter_names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(MERGE_ERROR)

    def unmerge(self) -> None:
        pass  # nothing is ever merged

    def offload(self, adapter_name: str) -> None:
        """Move an adapter's weights to the CPU. The first forward that routes by it loads them back."""
        self._move_adapter(adapter_name, torch.device("cpu"))
        self._offloaded.add(adapter_name)

    def _load_offloaded(self, adapter_names: Iterable[str], device: torch.device) -> None:
        for name in self._offloaded.intersection(adapter_names):
            self._move_adapter(name, device)
            self._offloaded.discard(name)

    def _move_adapter(self, adapter_name: str, device: torch.device) -> None:
        # Weights that are moved in inference mode could not be trained any more.
        with torch.inference_mode(False), torch.no_grad():
            for modules in self.adapter_layer_names:
                if adapter_name in getattr(self, modules):
                    getattr(self, modules)[adapter_name].to(device)

    def routed_adapters(self) -> list[str]:
        """The adapters to route by: the active one, or those of the samples. Empty if only the base layer is used."""
        if self.disable_adapters or all(self.route.shared_samples(self.training) or [False]):
            return []
        names = self.route.routing.calls.current(self.training).adapter_names
        names = self.active_adapters if names is None else list(dict.fromkeys(names))
        return [name for name in names if name in self.clsr_config]

    def is_frozen(self, adapter_name: str) -> bool:
        """True if no weight of an adapter in this layer is trained. Weights that FSDP gathered count as trained."""
        experts = [getattr(self, name) for name in self.adapter_layer_names]
        weights = [modules[adapter_name].weight for modules in experts if adapter_name in modules]
        return not any(weight.requires_grad or not isinstance(weight, nn.Parameter) for weight in weights)

    def gate_logits(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """Gate logits, float32 [...], of the tokens of `x` [..., in_features]. Only for a layer that owns the gate."""
        return gate_logits(x, self.clsr_gate_in[adapter_name], self.clsr_gate_out[adapter_name])

    def adapter_parameters(self, adapter_names: Iterable[str]) -> list[nn.Parameter]:
        """The parameters of gates and experts of the given adapters in this layer."""
        return [
            parameter
            for name in adapter_names
            for modules in self.adapter_layer_names
            if name in getattr(self, modules)
            for parameter in getattr(self, modules)[name].parameters()
        ]

    def _zero_gradients_of_unused(self, result: torch.Tensor, adapter_name: str | None) -> torch.Tensor:
        """
        In training, give zero gradients to the parameters that `result` [..., out_features] was computed without.

        These are all of a skipped module, as its gate has no gradient either where the budget is in no loss. If there
        are several processes, those of all adapters other than `adapter_name`, too: another process may train them.
        """
        if not self.training:
            return result
        unused = [adapter_name] if self.route.tokens.is_skipped else []
        if _is_distributed():
            unused += [name for name in self.clsr_config if name != adapter_name]
        return with_zero_gradients(result, [p for p in self.adapter_parameters(unused) if p.requires_grad])


class InputLinear(nn.Module, CLSRLayer):
    """An input projection of an FFN. The first one of an FFN owns the gate and chooses the path of each token."""

    def __init__(
        self, base_layer: nn.Linear, adapter_name: str, config: CLSRConfig, route: FFNRoute, owns_gate: bool
    ) -> None:
        super().__init__()
        CLSRLayer.__init__(self, base_layer, route, owns_gate)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor`): [..., in_features]

        Returns:
            `torch.Tensor`: soft: [..., 2 · out_features], the shared half, then the expert's ([..., out_features] if
            the module is skipped); hard: [..., out_features], rows in the order of the route.
        """
        adapter_names = self.routed_adapters()
        if torch.compiler.is_compiling():
            self.route.routing.calls.is_compiled = True
        if not adapter_names:
            self.route.start()
            result = self.base_layer(x, *args, **kwargs)
            return self._zero_gradients_of_unused(result, None)
        if self._offloaded:
            self._load_offloaded(adapter_names, x.device)
        if self.owns_gate:
            self.route.start().paths = [None, *adapter_names]
            if self.training and not self.is_frozen(adapter_names[0]):
                soft_routing.choose(self, x, adapter_names[0])
            else:
                hard_routing.choose(self, x, adapter_names)
        tokens = self.route.tokens
        if not tokens.is_set:
            raise RuntimeError(
                f"an input projection was called before {self.route.name!r}, which owns the gate of its FFN; the gate "
                "belongs to the first input projection of its module, so register the projections in the order of "
                "their use"
            )
        if tokens.is_soft:
            result = soft_routing.project_input(self, x, adapter_names[0])
            return self._zero_gradients_of_unused(result, adapter_names[0])
        return hard_routing.project_input(self, x)


class OutputLinear(nn.Module, CLSRLayer):
    """The output projection of an FFN, where the paths come together."""

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: CLSRConfig, route: FFNRoute) -> None:
        super().__init__()
        CLSRLayer.__init__(self, base_layer, route, owns_gate=False)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor`): what the input projections returned, after elementwise operations.

        Returns:
            `torch.Tensor`: [..., out_features], tokens in their own order.
        """
        tokens = self.route.tokens
        if not tokens.is_set:
            result = self.base_layer(x, *args, **kwargs)
            return self._zero_gradients_of_unused(result, None)
        if self._offloaded:
            self._load_offloaded(tokens.paths[1:], x.device)
        adapter_name = tokens.paths[1]
        if tokens.is_soft:
            result = soft_routing.project_output(self, x, adapter_name)
        else:
            result = hard_routing.project_output(self, x)
        result = self._zero_gradients_of_unused(result, adapter_name)
        tokens.clear()
        return result


def _is_distributed() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def check_one_adapter(adapter_names: str | list[str]) -> None:
    """Raise a `ValueError` if several adapters would be active at once."""
    if not isinstance(adapter_names, str) and len(adapter_names) > 1:
        raise ValueError(
            f"adapters {list(adapter_names)} cannot be active at once: an adapter is one language, and a token takes "
            f"one expert. Activate one, such as set_adapter({adapter_names[0]!r})"
        )
