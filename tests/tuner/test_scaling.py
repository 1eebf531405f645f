"""A share of what an adapter changes: the weights between those of the base model and of the training."""

import pytest
import torch
from helpers import logits_of, random_clsr
from peft import LoraConfig, get_peft_model

from peft_clsr import CLSRConfig, scale_expert


def open_gates(model):
    """All tokens take the expert, so that the outputs are those of its weights."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "clsr_gate_out" in name:
                weight.zero_()
    return model


@pytest.mark.parametrize("rank", [None, 4])
def test_half_of_an_expert_is_between_the_base_and_all_of_it(tiny_whisper, inputs, rank):
    base = tiny_whisper(init_std=0.2)
    shared = {name: weight.clone() for name, weight in base.named_parameters()}
    model = open_gates(random_clsr(base, "ca", "uk", expert_rank=rank))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    whole, other = logits_of(model, inputs, "ca"), logits_of(model, inputs, "uk")
    scale_expert(model, "ca", 0.5)
    changed = 0
    for name, weight in model.named_parameters():
        if ".ca." not in name or "gate" in name or "expert_A" in name:
            assert torch.equal(weight, before[name]), name
            continue
        start = 0
        if "expert.ca." in name:
            start = shared[name.removeprefix("base_model.model.").replace("clsr_expert.ca.", "")]
        torch.testing.assert_close(weight, (before[name] + start) / 2, msg=name)
        changed += 1
    assert changed == 8 * (2 if rank is None else 1)  # fc1 and fc2 of four layers; full ones have a bias, too
    half = logits_of(model, inputs, "ca")
    assert not torch.allclose(half, whole, atol=1e-3)
    assert torch.equal(logits_of(model, inputs, "uk"), other)
    scale_expert(model, "ca", 0)
    with model.disable_adapter():
        unchanged = model(**inputs).logits
    torch.testing.assert_close(logits_of(model, inputs, "ca"), unchanged, atol=1e-5, rtol=1e-4)


def test_all_of_an_expert_is_as_it_was(tiny_whisper):
    model = random_clsr(tiny_whisper(), "ca")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    scale_expert(model, "ca", 1)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_modules_that_are_trained_in_full_are_scaled_too(tiny_whisper):
    model = random_clsr(tiny_whisper(), "ca", expert_rank=4, modules_to_save=["model.encoder.layer_norm"])
    norm = model.base_model.model.model.encoder.layer_norm
    with torch.no_grad():
        norm.modules_to_save["ca"].weight.add_(2)
    scale_expert(model, "ca", 0.25)
    torch.testing.assert_close(norm.modules_to_save["ca"].weight, norm.original_module.weight + 0.5)


def test_an_adapter_of_transformers_own_interface(tiny_whisper):
    model = tiny_whisper()
    model.add_adapter(CLSRConfig(language="ca", expert_rank=4), "ca")
    weight = model.model.encoder.layers[0].fc1.clsr_expert_B["ca"].weight
    with torch.no_grad():
        weight.fill_(1)
    scale_expert(model, "ca", 0.5)
    assert torch.equal(weight, torch.full_like(weight, 0.5))


@pytest.mark.parametrize("scale", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(tiny_whisper, scale):
    model = random_clsr(tiny_whisper(), "ca")
    with pytest.raises(ValueError, match=rf"scale is {scale}, expected a share in \[0, 1\]"):
        scale_expert(model, "ca", scale)


def test_an_adapter_that_is_no_expert_is_refused(tiny_whisper):
    with pytest.raises(ValueError, match="has no expert 'uk', expected one of its own: ca"):
        scale_expert(random_clsr(tiny_whisper(), "ca"), "uk", 0.5)
    lora = get_peft_model(tiny_whisper(), LoraConfig(target_modules=["fc1", "fc2"]), adapter_name="uk")
    with pytest.raises(ValueError, match="has no expert 'uk', expected one of its own: none"):
        scale_expert(lora, "uk", 0.5)
    with pytest.raises(ValueError, match="has no expert 'uk'"):
        scale_expert(tiny_whisper(), "uk", 0.5)


def test_a_full_expert_on_offloaded_weights_is_refused_before_anything_changes(tiny_whisper):
    model = random_clsr(tiny_whisper(), "ca")
    (*_, last) = [module for module in model.modules() if hasattr(module, "clsr_expert")]
    before = {name: weight.clone() for name, weight in model.named_parameters() if "clsr_" in name}
    last.base_layer.to("meta")
    with pytest.raises(ValueError, match="are offloaded: load the model without a device_map"):
        scale_expert(model, "ca", 0.5)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters() if "clsr_" in name)
