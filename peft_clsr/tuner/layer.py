"""The two projections of a feed-forward network (FFN), each with the shared weight and an expert's."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from .config import CLSRConfig
from .gate import GateLinear, gate_logits, noise_deviation
from .route import FFNRoute
from .zero_gradients import with_zero_gradients

# An accelerator waits for the host to learn which tokens go where; for fewer tokens than this, it computes all paths.
MIN_TOKENS_TO_GROUP = 16

MERGE_ERROR = (
    "a CLSR adapter cannot be merged: each token is routed to the shared FFN or to the expert, which no single weight "
    "can do. Use the model with its adapter as it is (hard routing costs about what the base model does), "
    "save_pretrained() for the adapter alone, unload() for the unchanged base model, or freeze_routing() of "
    "peft_clsr.freeze for a plain Whisper of one language, at a cost that it measures"
)


class CLSRLayer(BaseTunerLayer):
    # All names of layers that may contain adapter (trainable) weights
    adapter_layer_names = ("clsr_gate_in", "clsr_gate_out", "clsr_expert", "clsr_expert_A", "clsr_expert_B")
    # All names of other parameters that may contain adapter-related parameters
    other_param_names = ("clsr_config",)
    # What `peft.helpers.disable_input_dtype_casting` switches off
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
        self._resting: set[str] = set()  # adapters on the CPU until they are used
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

    @torch.no_grad()
    def reset_clsr_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """
        Make the gate undecided and, with `init_weights`, the expert equal to the shared projection: the adapter then
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
            expert.weight.copy_(
                dequantize_module_weight(base_layer)
            )  # of bitsandbytes, torchao; else the weight itself
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
        """Move an adapter's weights to the CPU, until a forward routes by it."""
        self._move_adapter(adapter_name, torch.device("cpu"))
        self._resting.add(adapter_name)

    def _bring_in(self, adapter_names: Iterable[str], device: torch.device) -> None:
        for name in self._resting.intersection(adapter_names):
            self._move_adapter(name, device)
            self._resting.discard(name)

    def _move_adapter(self, adapter_name: str, device: torch.device) -> None:
        # Moved in inference mode, weights could not be trained any more.
        with torch.inference_mode(False), torch.no_grad():
            for modules in self.adapter_layer_names:
                if adapter_name in getattr(self, modules):
                    getattr(self, modules)[adapter_name].to(device)

    def _routed_adapters(self) -> list[str]:
        """
        Names of the adapters to route with: the active one, or those of a batch of several languages. Empty where the
        base layer stands alone.
        """
        if self.disable_adapters:
            return []
        names = self.route.routing.adapter_names
        names = self.active_adapters if names is None else list(dict.fromkeys(names))
        return [name for name in names if name in self.clsr_config]

    def adapter_parameters(self, adapter_names: Iterable[str]) -> list[nn.Parameter]:
        """The gate's and the expert's parameters, in this layer, of the adapters of these names."""
        return [
            parameter
            for name in adapter_names
            for modules in self.adapter_layer_names
            if name in getattr(self, modules)
            for parameter in getattr(self, modules)[name].parameters()
        ]

    def _with_all_gradients(self, result: torch.Tensor, adapter_name: str | None) -> torch.Tensor:
        """
        `result` [..., out_features] of a forward that routed by `adapter_name`; in training, what it left out gets
        gradients of zero: all of a skipped module, and other languages where other processes may train them.
        """
        if not self.training:
            return result
        unused = [adapter_name] if self.route.is_skipped else []
        if _several_processes():
            unused += [name for name in self.clsr_config if name != adapter_name]
        return with_zero_gradients(result, [p for p in self.adapter_parameters(unused) if p.requires_grad])

    def _apply_expert(self, x: torch.Tensor, adapter_name: str, shared: torch.Tensor | None = None) -> torch.Tensor:
        """
        The expert's projection of `x` [..., in_features], in the precision of the shared one.

        `shared`, the shared projection of the same `x`, saves a low-rank expert computing it again.
        """
        if adapter_name in self.clsr_expert:
            expert = self.clsr_expert[adapter_name]
            result = expert(self._cast_input_dtype(x, expert.weight.dtype))
        elif shared is None:
            result = self._add_low_rank(self.base_layer(x), x, adapter_name, in_place=self._owns_product_of(x))
        else:
            result = self._add_low_rank(shared, x, adapter_name)
        return result if torch.is_autocast_enabled(x.device.type) else result.to(x.dtype)

    def _owns_product_of(self, x: torch.Tensor) -> bool:
        """Whether no hook of the base layer may hold on to what it makes of `x`, so that it may be written over."""
        return not torch.is_grad_enabled() and _is_plain(self.base_layer, x)

    def _add_low_rank(
        self,
        result: torch.Tensor,
        x: torch.Tensor,
        adapter_name: str,
        is_chosen: torch.Tensor | None = None,
        in_place: bool = False,
    ) -> torch.Tensor:
        """
        `result` [..., out_features] plus a low-rank expert's own product of `x` [..., in_features].

        `is_chosen`, boolean [..., 1], leaves out the product of other rows.
        """
        A, B = self.clsr_expert_A[adapter_name], self.clsr_expert_B[adapter_name]
        hidden = A(self._cast_input_dtype(x, A.weight.dtype))
        if is_chosen is not None:
            hidden = torch.where(is_chosen, hidden, 0)  # not a product with 0, which of an overflow makes NaN
        if not _is_plain(B, hidden) or result.dtype != hidden.dtype:
            return (result + B(hidden.to(B.weight.dtype))).to(result.dtype)
        rows = result.view(-1, result.shape[-1])  # a product that is added as it is made, in one operation
        add = rows.addmm_ if in_place else partial(torch.addmm, rows)
        return add(hidden.view(-1, hidden.shape[-1]), B.weight.t()).view(result.shape)

    def _apply_path(self, x: torch.Tensor, path: str | None) -> torch.Tensor:
        return self.base_layer(x) if path is None else self._apply_expert(x, path)

    def _apply_all(self, x: torch.Tensor) -> torch.Tensor:
        """The projection [..., out_features] of each row of `x` by the path that the route chose, of all paths."""
        route = self.route
        result = self.base_layer(x)
        choice = route.choice.view(*x.shape[:-1], 1)
        for index, path in enumerate(route.paths):
            if path in self.clsr_expert_B:
                result = self._add_low_rank(result, x, path, choice == index, self._owns_product_of(x))
            elif path is not None:
                result = torch.where(choice == index, self._apply_expert(x, path), result)
        return result

    def _new_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Room for the projections of `x` [..., in_features], as rows: [tokens, out_features]."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return x.new_empty(x.shape[:-1].numel(), self.out_features, dtype=dtype)


class InputLinear(nn.Module, CLSRLayer):
    """An input projection of an FFN. The first of an FFN owns the gate."""

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
            `torch.Tensor`: soft: [..., 2 · out_features], the shared half, then the expert's; hard: [...,
            out_features], rows in the order of the route.
        """
        adapter_names, route = self._routed_adapters(), self.route
        if not adapter_names:
            route.clear()
            result = self.base_layer(x, *args, **kwargs)
            return self._with_all_gradients(result, None)
        if self._resting:
            self._bring_in(adapter_names, x.device)
        if self.owns_gate:
            route.clear()
            route.paths = [None, *adapter_names]
            if self.training:
                self._choose_soft(x, adapter_names[0])
            else:
                self._choose_hard(x, adapter_names)
        if not route.is_set:
            raise RuntimeError(
                f"an input projection was called before {route.name!r}, which owns the gate of its FFN; the gate "
                "belongs to the first input projection of its module, so register the projections in the order of "
                "their use"
            )
        if route.is_soft:
            result = shared = self.base_layer(x)
            if not route.is_skipped:
                result = torch.cat([shared, self._apply_expert(x, adapter_names[0], shared)], dim=-1)
            return self._with_all_gradients(result, adapter_names[0])
        if not route.groups:
            return self._apply_all(x)
        if len(route.groups) == 1:
            return self._apply_path(x, route.groups[0][0])
        rows, result, start = x.reshape(-1, x.shape[-1]), self._new_rows(x), 0
        for path, tokens in route.groups:
            end = start + len(tokens)
            self._write_path(rows.index_select(0, tokens), path, result[start:end])
            start = end
        return result.view(*x.shape[:-1], -1)

    def _write_path(self, x: torch.Tensor, path: str | None, out: torch.Tensor) -> None:
        """Write the projection of `x` [tokens, in_features] by one path into `out` [tokens, out_features]."""
        linear = self.base_layer if path is None else self.clsr_expert[path] if path in self.clsr_expert else None
        # Where this is possible, it spares a tensor as large as `out`, whose memory costs about as much as the gate.
        if linear is None or torch.is_grad_enabled() or not _is_plain(linear, x):
            out.copy_(self._apply_path(x, path))
        elif linear.bias is None:
            torch.mm(x, linear.weight.t(), out=out)
        else:
            torch.addmm(linear.bias, x, linear.weight.t(), out=out)

    def _choose_soft(self, x: torch.Tensor, adapter_name: str) -> None:
        """Set a soft route for the tokens of `x` [..., in_features]."""
        config, route = self.clsr_config[adapter_name], self.route
        gate_in, gate_out = self.clsr_gate_in[adapter_name], self.clsr_gate_out[adapter_name]
        is_compiling = torch.compiler.is_compiling()
        # Drawn by torch's generator, which gradient checkpointing repeats; on the CPU: no device is waited for.
        if not is_compiling and torch.rand((), device="cpu").item() < config.skip_gate_prob:
            route.is_skipped = True
            route.routing.add(route.name, torch.zeros(x.shape[:-1], device=x.device), config, trains=False)
            return
        logits = gate_logits(F.dropout(x, config.gate_dropout), gate_in, gate_out)
        alpha = noise_deviation(route.routing.gate_progress, config.gate_noise, config.straight_through)
        if alpha:
            logits = logits + alpha * torch.randn_like(logits)
        gate_values = logits.sigmoid()
        if config.straight_through:
            gate_values = gate_values + ((logits >= 0).to(gate_values.dtype) - gate_values).detach()
        if is_compiling and config.skip_gate_prob:  # a branch on a random number would break the graph
            gate_values = gate_values * (torch.rand((), device=x.device) >= config.skip_gate_prob)
        route.gate = gate_values.unsqueeze(-1)
        route.routing.add(route.name, gate_values, config, trains=gate_out.weight.requires_grad)

    def _choose_hard(self, x: torch.Tensor, adapter_names: list[str]) -> None:
        """Set a hard route for the tokens of `x` [..., in_features]."""
        route = self.route
        names = route.routing.adapter_names
        if names is None or set(names) == {adapter_names[0]}:
            name = adapter_names[0]
            choice = gate_logits(x, self.clsr_gate_in[name], self.clsr_gate_out[name]) >= 0
        else:
            choice = self._choose_by_sample(x, names, adapter_names)
        if route.routing.listens:
            route.routing.add(route.name, (choice > 0).float(), self.clsr_config[adapter_names[0]], trains=False)

        # Low-rank experts are products on top of the shared one: there is nothing to group.
        has_full = any(name in self.clsr_expert for name in adapter_names)
        # Compiled, the sizes of groups would be shapes that depend on data; and an accelerator would be waited for.
        if torch.compiler.is_compiling() or (
            x.device.type != "cpu" and (not has_full or choice.numel() < MIN_TOKENS_TO_GROUP)
        ):
            route.choice = choice
            return
        choice_of_rows = choice.flatten().long()
        sizes = choice_of_rows.bincount(minlength=len(route.paths)).tolist()
        used = [path for path, size in zip(route.paths, sizes, strict=True) if size]
        if len(used) <= 1:
            route.groups = [(used[0] if used else None, None)]
        elif has_full:
            groups = zip(route.paths, choice_of_rows.argsort(stable=True).split(sizes), strict=True)
            route.groups = [(path, tokens) for path, tokens in groups if len(tokens)]
        else:
            route.choice = choice

    def _choose_by_sample(self, x: torch.Tensor, names: list[str], adapter_names: list[str]) -> torch.Tensor:
        """The path of each token, int64 as `x` without its last dimension: 0, or 1 + an index into `adapter_names`."""
        if "encoder" in self.route.name.split(".") and len(x) != len(names):
            raise ValueError(
                f"{len(names)} adapter_names for a batch of {len(x)}: Whisper runs a part of a batch again for "
                "audio longer than its context, for timestamps and for several temperatures, and the names would "
                "fall on other samples. Give `language=[...]` in their place, which goes with the samples"
            )
        # Tokens of a sample stand together; with beams, those of its beams do.
        samples = x.reshape(len(names), -1, x.shape[-1])  # [samples, tokens, in_features]
        choice = torch.zeros(samples.shape[:2], dtype=torch.long, device=x.device)
        for index, name in enumerate(adapter_names, start=1):
            of_name = [row for row, sample_name in enumerate(names) if sample_name == name]
            logits = gate_logits(samples[of_name], self.clsr_gate_in[name], self.clsr_gate_out[name])
            choice[of_name] = (logits >= 0).long() * index
        return choice.view(x.shape[:-1])


class OutputLinear(nn.Module, CLSRLayer):
    """The output projection of an FFN, which puts the two paths together."""

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
        route = self.route
        if not route.is_set:
            result = self.base_layer(x, *args, **kwargs)
            return self._with_all_gradients(result, None)
        if self._resting:
            self._bring_in(route.paths[1:], x.device)
        adapter_name = route.paths[1]
        if route.is_skipped:
            result = self.base_layer(x)
        elif route.gate is not None:
            result = self._blend(x, adapter_name)
        elif not route.groups:
            result = self._apply_all(x)
        elif len(route.groups) == 1:
            result = self._apply_path(x, route.groups[0][0])
        else:
            rows, result = x.reshape(-1, x.shape[-1]), self._new_rows(x)
            groups = rows.split([len(tokens) for _, tokens in route.groups])
            for (path, tokens), group in zip(route.groups, groups, strict=True):
                result.index_copy_(0, tokens, self._apply_path(group, path))
            result = result.view(*x.shape[:-1], -1)
        result = self._with_all_gradients(result, adapter_name)
        route.clear()
        return result

    def _blend(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """
        The projections of both halves of `x` [..., 2 · in_features], blended by the gate: [..., out_features].

        For a low-rank expert, the shared weight takes the blend of both halves, in one product; so `expert_dropout` is
        on what goes into the expert's projection, which makes noise of all that it says, too.
        """
        shared_half, expert_half = x.chunk(2, dim=-1)
        gate = self.route.gate.view(*x.shape[:-1], 1)
        dropout = self.clsr_config[adapter_name].expert_dropout
        if adapter_name in self.clsr_expert:
            shared = self.base_layer(shared_half)
            expert = F.dropout(self._apply_expert(expert_half, adapter_name), dropout)
            return (shared + gate * (expert - shared)).to(shared.dtype)
        expert_half = F.dropout(expert_half, dropout)
        shared = self.base_layer(torch.lerp(shared_half, expert_half, gate.to(x.dtype)))
        A, B = self.clsr_expert_A[adapter_name], self.clsr_expert_B[adapter_name]
        own = B(A(self._cast_input_dtype(expert_half, A.weight.dtype)))
        return (shared + gate * own).to(shared.dtype)


def _is_plain(linear: nn.Module, x: torch.Tensor) -> bool:
    """
    Whether a linear layer is no more than the product of `x` with a weight, which may then be computed in another way:
    not quantized, sharded, offloaded, hooked, or of another precision.
    """
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and linear.weight.dtype == x.dtype
        and not torch.is_autocast_enabled(x.device.type)
        and "forward" not in vars(linear)  # accelerate's way to offload
        and not (linear._forward_hooks or linear._forward_pre_hooks)
    )


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def check_one_adapter(adapter_names: str | list[str]) -> None:
    """Raise a `ValueError` if several adapters would be active at once."""
    if not isinstance(adapter_names, str) and len(adapter_names) > 1:
        raise ValueError(
            f"adapters {list(adapter_names)} cannot be active at once: an adapter is one language, and a token takes "
            f"one expert. Activate one, such as set_adapter({adapter_names[0]!r})"
        )
