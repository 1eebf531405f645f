"""Bases whose weights are elsewhere: offloaded by accelerate to the CPU or the disk, or on the meta device."""

import pytest
import torch
from accelerate import cpu_offload
from helpers import SMALL, randomize
from peft import PeftModel, get_peft_model
from transformers import WhisperForConditionalGeneration
from versions import adapters_on_the_disk

from peft_clsr import CLSRConfig

CA = {"seed": sum(map(ord, "ca")), "scale": 0.3}  # random weights of the adapter "ca"
ON_CPU = (
    *(f"model.encoder.{name}" for name in ("conv1", "conv2", "embed_positions", "layer_norm", "layers.0")),
    *(f"model.decoder.{name}" for name in ("embed_tokens", "embed_positions", "layer_norm", "layers.1")),
    "proj_out",
)
ON_DISK = ("model.encoder.layers.1", "model.decoder.layers.0")
DEVICE_MAP = {**dict.fromkeys(ON_CPU, "cpu"), **dict.fromkeys(ON_DISK, "disk")}


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT 0.21 writes offloaded weights relative to it, whatever offload_folder says


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return {
        "input_features": torch.randn(2, 80, 100, generator=generator),
        "labels": torch.randint(0, 200, (2, 6), generator=generator),
    }


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs).logits


@pytest.fixture
def plain(tiny_whisper):
    return lambda: tiny_whisper(init_std=0.2)


@pytest.fixture(params=["disk", "cpu"])
def offloaded(request, plain):
    """The same base behind accelerate's hooks: the weights of some layers on the disk, or of all on the CPU."""

    def build():
        if request.param == "cpu":
            return cpu_offload(plain(), execution_device="cpu")
        plain().save_pretrained("base")
        return WhisperForConditionalGeneration.from_pretrained(
            "base", device_map=DEVICE_MAP, offload_folder="offload", dtype=torch.float32
        ).eval()

    return build


@pytest.mark.parametrize("rank", [None, 2])
def test_experts_on_an_offloaded_base_start_as_the_shared_network(plain, offloaded, inputs, rank):
    base, reference = offloaded(), plain()
    assert base.model.encoder.layers[1].fc1.weight.is_meta
    expected = logits_of(reference, inputs)
    torch.manual_seed(0)
    model = get_peft_model(base, CLSRConfig.paper(**SMALL, expert_rank=rank), adapter_name="ca")
    model.add_adapter("uk", CLSRConfig.paper(**SMALL))
    experts = model.base_model.model.model.encoder.layers[1].fc1.clsr_expert
    assert torch.equal(experts["uk"].weight, reference.model.encoder.layers[1].fc1.weight)
    assert not any(p.is_meta for name, p in model.named_parameters() if "clsr_" in name)
    for adapter in ("ca", "uk"):
        model.set_adapter(adapter)
        for training in (False, True):
            torch.testing.assert_close(logits_of(model.train(training), inputs), expected, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits_of(model.eval(), inputs), expected)


def test_an_adapter_trained_on_an_offloaded_base_loads_on_a_plain_one(plain, offloaded, inputs):
    model = randomize(get_peft_model(offloaded(), CLSRConfig.paper(**SMALL), adapter_name="ca"), "ca", **CA).train()
    model(**inputs).loss.backward()
    assert all((p.grad is not None) == ("clsr_" in name) for name, p in model.named_parameters())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    expected = logits_of(model.eval(), inputs)
    model.save_pretrained("adapter")
    loaded = PeftModel.from_pretrained(plain(), "adapter", subfolder="ca", adapter_name="ca").eval()
    torch.testing.assert_close(logits_of(loaded, inputs), expected, atol=1e-5, rtol=1e-5)


def test_unloading_leaves_the_offloaded_base(plain, offloaded, inputs):
    model = randomize(get_peft_model(offloaded(), CLSRConfig.paper(**SMALL), adapter_name="ca"), "ca", **CA).eval()
    assert not torch.allclose(logits_of(model, inputs), logits_of(plain(), inputs), atol=1e-3)
    base = model.unload()
    assert base.model.encoder.layers[1].fc1.weight.is_meta
    assert torch.equal(logits_of(base, inputs), logits_of(plain(), inputs))


@adapters_on_the_disk
@pytest.mark.parametrize("offloaded", ["disk"], indirect=True)
def test_adapters_load_on_a_base_that_rests_on_the_disk(plain, offloaded, inputs):
    model = get_peft_model(plain(), CLSRConfig.paper(**SMALL), adapter_name="ca").eval()
    model.add_adapter("uk", CLSRConfig.paper(**SMALL))
    expected = {}
    for adapter in ("uk", "ca"):
        randomize(model, adapter, seed=sum(map(ord, adapter)), scale=0.3).set_adapter(adapter)
        expected[adapter] = logits_of(model, inputs)
    model.save_pretrained("adapters")

    loaded = PeftModel.from_pretrained(
        offloaded(),
        "adapters",
        subfolder="ca",
        adapter_name="ca",
        device_map={f"base_model.model.{name}": device for name, device in DEVICE_MAP.items()},
        offload_folder="offload",
    ).eval()
    assert loaded.base_model.model.model.encoder.layers[1].fc1.base_layer.weight.is_meta
    torch.testing.assert_close(logits_of(loaded, inputs), expected["ca"], atol=1e-6, rtol=1e-6)
    loaded.load_adapter("adapters/uk", "uk")
    loaded.set_adapter("uk")
    torch.testing.assert_close(logits_of(loaded, inputs), expected["uk"], atol=1e-6, rtol=1e-6)
    loaded.set_adapter("ca")
    torch.testing.assert_close(logits_of(loaded, inputs), expected["ca"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rank", [None, 2])
def test_an_adapter_on_the_meta_device_has_the_names_and_shapes_of_a_real_one(plain, rank):
    config = CLSRConfig.paper(**SMALL, expert_rank=rank)
    shapes = {name: p.shape for name, p in get_peft_model(plain(), config, adapter_name="ca").named_parameters()}
    with torch.device("meta"):
        base = plain()
    model = get_peft_model(base, config, adapter_name="ca")
    assert all(p.is_meta for p in model.parameters())
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {n for n in shapes if "clsr_" in n}
