"""Bases that accelerate spreads over devices: the CPU and the disk."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import WhisperForConditionalGeneration

from peft_clsr import CLSRConfig

ON_DISK = ("model.encoder.layers.1", "model.decoder.layers.0")


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return {
        "input_features": torch.randn(2, 80, 100, generator=generator),
        "decoder_input_ids": torch.randint(0, 200, (2, 6), generator=generator),
    }


def test_an_adapter_on_a_base_that_rests_on_the_disk(tiny_whisper, inputs, tmp_path):
    base = tiny_whisper(init_std=0.2)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, CLSRConfig(gate_dim=8), adapter_name="ca").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "clsr_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "adapter")

    names = ["model.encoder.conv1", "model.encoder.conv2", "model.encoder.embed_positions", "model.encoder.layer_norm"]
    names += ["model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.layer_norm", "proj_out"]
    names += ["model.encoder.layers.0", "model.decoder.layers.1"]
    device_map = {**dict.fromkeys(names, "cpu"), **dict.fromkeys(ON_DISK, "disk")}
    offloaded = WhisperForConditionalGeneration.from_pretrained(
        tmp_path / "base", device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    assert offloaded.model.encoder.layers[1].fc1.weight.is_meta
    loaded = PeftModel.from_pretrained(
        offloaded,
        tmp_path / "adapter",
        subfolder="ca",
        adapter_name="ca",
        device_map={f"base_model.model.{name}": device for name, device in device_map.items()},
        offload_folder=tmp_path / "offload",
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-6, rtol=1e-6)
