"""The two projections of a feed-forward network (FFN), each with the shared weight and an expert's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import CLSRConfig
from .gate import GateLinear, gate_logits
from .route import Route

# Below this many tokens, sorting them costs more than computing both paths (decoding one token at a time).
MIN_TOKENS_TO_SORT = 16

MERGE_ERROR = (
    "a CLSR adapter cannot be merged: each token is routed to the shared FFN or to the expert, which no single weight "
    "can do. Use the model with its adapter as it is (hard routing costs about what the base model does), "
    "save_pretrained() for the adapter alone, or unload() for the unchanged base model"
)


class CLSRLayer(BaseTunerLayer):
    # All names of layers that may contain adapter (trainable) weights
    adapter_layer_names = ("clsr_gate_in", "clsr_gate_out", "clsr_expert", "clsr_expert_A", "clsr_expert_B")
    # All names of other parameters that may contain adapter-related parameters
    other_param_names = ("clsr_config",)

    def __init__(self, base_layer: nn.Linear, route: Route, owns_gate: bool) -> None:
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
        if config.init_weights:
            self.reset_clsr_parameters(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_clsr_parameters(self, adapter_name: str) -> None:
        """Make the gate undecided and the expert equal to the shared projection: the adapter then changes nothing."""
        if adapter_name in self.clsr_gate_in:
            nn.init.normal_(self.clsr_gate_in[adapter_name].weight, std=0.01)
            nn.init.zeros_(self.clsr_gate_in[adapter_name].bias)
            nn.init.zeros_(self.clsr_gate_out[adapter_name].weight)
        if adapter_name in self.clsr_expert_B:
            nn.init.zeros_(self.clsr_expert_B[adapter_name].weight)
        if adapter_name in self.clsr_expert:
            base_layer, expert = self.get_base_layer(), self.clsr_expert[adapter_name]
            if base_layer.weight.is_meta or expert.weight.is_meta:
                return  # low_cpu_mem_usage: the weights come from a file
            expert.weight.copy_(base_layer.weight)
            if expert.bias is not None:
                expert.bias.copy_(base_layer.bias)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        check_one_adapter(adapter_names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(MERGE_ERROR)

    def unmerge(self) -> None:
        pass  # nothing is ever merged

    def _routed_adapter(self) -> str | None:
        """Name of the adapter to route with, or `None` where the base layer stands alone."""
        if self.disable_adapters or not self.active_adapters:
            return None
        adapter_name = self.active_adapters[0]
        return adapter_name if adapter_name in self.clsr_config else None

    def _apply_expert(self, x: torch.Tensor, adapter_name: str, shared: torch.Tensor | None = None) -> torch.Tensor:
        """
        The expert's projection of `x` [..., in_features], in the precision of the shared one.

        `shared`, the shared projection of the same `x`, saves a low-rank expert computing it again.
        """
        if adapter_name in self.clsr_expert:
            expert = self.clsr_expert[adapter_name]
            result = expert(self._cast_input_dtype(x, expert.weight.dtype))
        else:
            A, B = self.clsr_expert_A[adapter_name], self.clsr_expert_B[adapter_name]
            shared = self.base_layer(x) if shared is None else shared
            result = shared + B(A(self._cast_input_dtype(x, A.weight.dtype)))
        return result if torch.is_autocast_enabled(x.device.type) else result.to(x.dtype)

    def _apply_one_path_each(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """
        The projection [..., out_features] of each row of `x` by the path that the (hard) route gives it.

        Where the route sorts, rows are taken as sorted, and stay so.
        """
        route = self.route
        if route.path == "shared":
            return self.base_layer(x)
        if route.path == "expert":
            return self._apply_expert(x, adapter_name)
        if route.order is not None:
            x = x.reshape(-1, x.shape[-1])
            shared = self.base_layer(x[: route.num_shared])
            return torch.cat([shared, self._apply_expert(x[route.num_shared :], adapter_name)])
        shared = self.base_layer(x)
        expert_rows = route.expert_rows.view(*x.shape[:-1], 1)
        return torch.where(expert_rows, self._apply_expert(x, adapter_name, shared), shared)


class InputLinear(nn.Module, CLSRLayer):
    """An input projection of an FFN. The first of an FFN owns the gate."""

    def __init__(
        self, base_layer: nn.Linear, adapter_name: str, config: CLSRConfig, route: Route, owns_gate: bool
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
            `torch.Tensor`: soft: [..., 2 · out_features], the shared half, then the expert's; hard: [...,
            out_features], rows in the order of the route.
        """
        adapter_name = self._routed_adapter()
        if adapter_name is None:
            self.route.clear()
            return self.base_layer(x, *args, **kwargs)
        if self.owns_gate:
            self._choose(x, adapter_name)
        route = self.route
        if not route.is_set:
            raise RuntimeError(
                f"an input projection was called before {route.name!r}, which owns the gate of its FFN; the gate "
                "belongs to the first input projection of its module, so register the projections in the order of "
                "their use"
            )
        if route.gate is not None:
            shared = self.base_layer(x)
            return torch.cat([shared, self._apply_expert(x, adapter_name, shared)], dim=-1)
        if route.order is None:
            return self._apply_one_path_each(x, adapter_name)
        rows = x.reshape(-1, x.shape[-1])[route.order]
        return self._apply_one_path_each(rows, adapter_name).view(*x.shape[:-1], -1)

    def _choose(self, x: torch.Tensor, adapter_name: str) -> None:
        """Set the route for the tokens of `x` [..., in_features]."""
        config, route = self.clsr_config[adapter_name], self.route
        route.clear()
        gate_in, gate_out = self.clsr_gate_in[adapter_name], self.clsr_gate_out[adapter_name]
        if self.training:
            logits = gate_logits(F.dropout(x, config.gate_dropout), gate_in, gate_out)
            alpha = route.routing.gate_progress * config.gate_noise
            if alpha:
                logits = logits + alpha * torch.randn_like(logits)
            gate_values = logits.sigmoid()
            if config.skip_gate_prob:
                # A product, not a branch: the gradients of a skipped gate and expert are zeros, not missing (DDP), and
                # the draw is torch's, which gradient checkpointing repeats.
                gate_values = gate_values * (torch.rand((), device=x.device) >= config.skip_gate_prob)
            route.gate = gate_values.unsqueeze(-1)
        else:
            to_expert = gate_logits(x, gate_in, gate_out) >= 0
            gate_values = to_expert.float()
            self._set_hard_route(to_expert.flatten())
        route.routing.add(route.name, gate_values, config, trains=gate_out.weight.requires_grad)

    def _set_hard_route(self, to_expert: torch.Tensor) -> None:
        """`to_expert`: bool [tokens]."""
        route = self.route
        if torch.compiler.is_compiling():  # the size of the groups would be a shape that depends on data
            route.expert_rows = to_expert
            return
        expert_rows = to_expert.nonzero().squeeze(-1)
        route.num_shared = len(to_expert) - len(expert_rows)
        if len(expert_rows) == 0:
            route.path = "shared"
        elif route.num_shared == 0:
            route.path = "expert"
        elif len(to_expert) < MIN_TOKENS_TO_SORT:
            route.expert_rows = to_expert
        else:
            route.order = torch.cat([to_expert.logical_not().nonzero().squeeze(-1), expert_rows])


class OutputLinear(nn.Module, CLSRLayer):
    """The output projection of an FFN, which puts the two paths together."""

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: CLSRConfig, route: Route) -> None:
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
        adapter_name, route = self._routed_adapter(), self.route
        if adapter_name is None or not route.is_set:
            return self.base_layer(x, *args, **kwargs)
        if route.gate is not None:
            shared_half, expert_half = x.chunk(2, dim=-1)
            shared = self.base_layer(shared_half)
            expert = self._apply_expert(expert_half, adapter_name)
            expert = F.dropout(expert, self.clsr_config[adapter_name].expert_dropout)
            result = (shared + route.gate.view(*shared.shape[:-1], 1) * (expert - shared)).to(shared.dtype)
        else:
            result = self._apply_one_path_each(x, adapter_name)
            if route.order is not None:
                result = torch.empty_like(result).index_copy(0, route.order, result).view(*x.shape[:-1], -1)
        route.clear()
        return result


def check_one_adapter(adapter_names: str | list[str]) -> None:
    """Raise a `ValueError` if several adapters would be active at once."""
    if not isinstance(adapter_names, str) and len(adapter_names) > 1:
        raise ValueError(
            f"adapters {list(adapter_names)} cannot be active at once: an adapter is one language, and a token takes "
            f"one expert. Activate one, such as set_adapter({adapter_names[0]!r})"
        )
