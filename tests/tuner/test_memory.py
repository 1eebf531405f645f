"""Many languages on one model: what is in memory, and what moves."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_clsr import CLSRConfig

CODES = ["ca", "ro", "be", "bg", "el", "fr", "en", "uk"]


@pytest.fixture
def model(tiny_whisper):
    model = get_peft_model(tiny_whisper(init_std=0.2), CLSRConfig.paper(gate_dim=8), adapter_name=CODES[0])
    for code in CODES[1:]:
        model.add_adapter(code, CLSRConfig.paper(gate_dim=8))
    return model.eval()


@pytest.fixture
def moves(monkeypatch):
    """The moves of modules from here on: name of the device."""
    moves, to = [], nn.Module.to

    def record(module, device):
        moves.append(str(device))
        return to(module, device)

    monkeypatch.setattr(nn.Module, "to", record)
    return moves


def features(batch=2):
    return torch.randn(batch, 80, 100, generator=torch.Generator().manual_seed(0))


def storages(model):
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in model.parameters()}


@pytest.mark.performance
def test_eight_languages_hold_the_base_once(model, tiny_whisper):
    base = storages(tiny_whisper())
    adapter = sum(4 * weight.numel() for name, weight in model.named_parameters() if ".ca." in name)
    assert adapter > 0
    assert sum(storages(model).values()) == sum(base.values()) + len(CODES) * adapter


@pytest.mark.performance
def test_changing_the_language_copies_nothing(model):
    before = storages(model)
    for code in CODES:
        model.set_adapter(code)
        model.generate(input_features=features(), language=["ca", "ro"], max_new_tokens=2)
    assert storages(model) == before


@pytest.mark.performance
def test_offloaded_experts_are_loaded_when_they_are_used(model, moves):
    expected = model.generate(input_features=features(), language="ro", max_new_tokens=4)
    model.base_model.offload()
    assert moves == ["cpu"] * 16 * (len(CODES) - 1)  # in each of 4 FFNs two of the gate's and two of the expert's
    moves.clear()
    model.generate(input_features=features(), language="ca", max_new_tokens=4)  # the active one is not offloaded
    assert not moves
    assert torch.equal(model.generate(input_features=features(), language="ro", max_new_tokens=4), expected)
    assert len(moves) == 16
    model.generate(input_features=features(), language="ro", max_new_tokens=4)
    assert len(moves) == 16
    model.base_model.offload("ro")
    moves.clear()
    model.set_adapter("ro")
    with torch.no_grad():
        model(input_features=features(), decoder_input_ids=torch.zeros(2, 3, dtype=torch.long))
    assert len(moves) == 16


def test_an_expert_that_is_loaded_at_inference_can_be_trained(model, monkeypatch):
    """A move between precisions stands for one between devices, as it makes new tensors too."""
    to = nn.Module.to
    dtypes = iter([torch.float64] * 16 + [torch.float32] * 16)
    monkeypatch.setattr(nn.Module, "to", lambda module, device: to(module, next(dtypes)))
    model.base_model.offload("ro")
    with torch.inference_mode():
        model.generate(input_features=features(), language="ro", max_new_tokens=2)
    model.set_adapter("ro")
    labels = torch.zeros(2, 3, dtype=torch.long)
    model.train()(input_features=features(), labels=labels).loss.backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if ".ro." in name)


def test_offloading_an_unknown_adapter_is_refused(model, moves):
    with pytest.raises(ValueError, match=r"adapters \['xx'\] are not on the model, which has \['be', 'bg'"):
        model.base_model.offload(["ca", "xx"])
    assert not moves


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_experts_are_on_the_cpu(model):
    model.cuda()
    model.base_model.offload("ro")

    def devices():
        return {weight.device.type for name, weight in model.named_parameters() if ".ro." in name}

    assert devices() == {"cpu"}
    model.generate(input_features=features().cuda(), language="ro", max_new_tokens=2)
    assert devices() == {"cuda"}
