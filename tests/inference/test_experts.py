"""Experts are loaded in the precision of the base, which halves them for a service on a GPU."""

import pytest
import torch
from helpers import logits_of, random_clsr

from peft_clsr.inference.experts import load_with_experts

KINDS = {"low-rank": {"expert_rank": 4}, "full": {}}


@pytest.mark.parametrize("kind", KINDS)
def test_experts_take_the_precision_of_the_base(tiny_whisper, tiny_processor, inputs, tmp_path, kind):
    tiny_whisper().save_pretrained(tmp_path / "base")
    tiny_processor.save_pretrained(tmp_path / "base")
    random_clsr(tiny_whisper(), "ca", "ro", **KINDS[kind]).save_pretrained(tmp_path / "experts")
    sizes, logits = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = load_with_experts(str(tmp_path / "base"), [str(tmp_path / "experts")], {"ca", "ro"}, dtype)
        weights = [weight for name, weight in model.named_parameters() if ".ca." in name or ".ro." in name]
        assert {weight.dtype for weight in weights} == {dtype}
        sizes[dtype] = sum(weight.nbytes for weight in weights)
        same = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        logits[dtype] = {name: logits_of(model.eval(), same, name).float() for name in ("ca", "ro")}
    assert sizes[torch.bfloat16] * 2 == sizes[torch.float32]
    exact, rounded = logits.values()
    for name in exact:
        error = (rounded[name] - exact[name]).abs().mean()
        assert error < 0.1 * (exact["ca"] - exact["ro"]).abs().mean()
