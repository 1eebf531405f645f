"""The student of a routed model: the same adapter, whose gates always take the expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel

from .plain_ffn import Decision, routed_projections

# sigmoid(100) is 1 in float32, and its gradient 0: training does not move the gate.
_GATE_LOGIT = 100.0


@torch.no_grad()
def always_expert(model: PeftModel, adapter_name: str, decisions: Mapping[str, Decision]) -> PeftModel:
    """
    Put all gates of an adapter on the expert, and make it trainable.

    Args:
        model (`PeftModel`): A model with one adapter. It is changed.
        adapter_name (`str`): The adapter.
        decisions (`Mapping[str, str]`): Gated module to "expert", which stays, or "shared", whose expert becomes a
            copy of the shared FFN.

    Returns:
        `PeftModel`: `model`.
    """
    config: Any = model.peft_config[adapter_name]
    config.straight_through, config.inference_mode = True, False
    config.gate_noise = config.gate_dropout = config.skip_gate_prob = config.expert_dropout = 0.0
    config.budget_weight = 0.0
    for gate, projections in routed_projections(model.get_base_model(), adapter_name).items():
        for layer in projections.values():
            if decisions[gate] == "shared":
                layer.reset_clsr_parameters(adapter_name)
            if layer.owns_gate:
                _fix_gate(layer.clsr_gate_in[adapter_name], layer.clsr_gate_out[adapter_name])
    model.set_adapter(adapter_name)  # its weights are trained then, also those that were loaded for inference
    return model


def _fix_gate(gate_in: Any, gate_out: Any) -> None:
    """Make the logit the same for all tokens."""
    gate_in.weight.zero_()
    gate_in.bias.fill_(1.0)
    gate_out.weight.fill_(_GATE_LOGIT / gate_out.in_features)
