"""A LoRA from a frozen routing: a plain adapter of PEFT, with the logits of the frozen model."""

import json
import subprocess
import sys

import pytest
import torch
from freezing import EXPERT, MIXED, MODULES, SHARED, logits_of
from peft import PeftModel
from safetensors.torch import load_file

from peft_clsr import CLSRConfig, CLSRLayer

GATES = [EXPERT, SHARED, SHARED, EXPERT]
EXPERTS = [MODULES[0], MODULES[0].replace("fc1", "fc2"), MODULES[3], MODULES[3].replace("fc1", "fc2")]


@pytest.fixture
def base(tiny_whisper):
    """The base of `routed`, anew: LoRA layers are put into the model itself."""
    return lambda: tiny_whisper(init_std=0.5, max_target_positions=20)


def close(logits, expected):
    return torch.allclose(logits, expected, atol=1e-5, rtol=1e-5)


def test_low_rank_experts_are_a_lora_of_the_same_logits_that_merges(routed, freeze, base, dataset, tmp_path):
    frozen = freeze(routed(GATES, expert_rank=3))
    assert frozen.save_as_lora(tmp_path / "lora") == 0
    expected = logits_of(frozen.model, dataset)
    assert not torch.allclose(logits_of(base(), dataset), expected, atol=0.1)
    lora = PeftModel.from_pretrained(base(), tmp_path / "lora")
    assert close(logits_of(lora, dataset), expected)
    merged = lora.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert close(logits_of(merged, dataset), expected)


def test_the_folder_is_what_peft_and_vllm_read(routed, freeze, base, tmp_path):
    whisper = base()
    whisper.name_or_path = whisper.config.name_or_path = "openai/whisper-tiny"
    freeze(routed(GATES, base=whisper, expert_rank=3)).save_as_lora(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] is None
    assert config["base_model_name_or_path"] == "openai/whisper-tiny"
    assert config["auto_mapping"]["base_model_class"] == "WhisperForConditionalGeneration"
    assert config["r"] == config["lora_alpha"] == 3 and not config["rank_pattern"] and not config["alpha_pattern"]
    assert config["lora_bias"] is False and config["bias"] == "none" and config["modules_to_save"] is None
    assert sorted(config["target_modules"]) == sorted(EXPERTS)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert sorted(keys) == sorted(f"base_model.model.{key}.lora_{AB}.weight" for key in EXPERTS for AB in "AB")


def test_a_process_without_this_library_loads_it(routed, freeze, base, dataset, tmp_path):
    frozen = freeze(routed(GATES, expert_rank=3))
    frozen.save_as_lora(tmp_path / "lora")
    base().save_pretrained(tmp_path / "base")
    torch.save(torch.as_tensor(dataset["input_features"][:]), tmp_path / "features.pt")
    script = """
import sys, torch
from peft import PeftModel
from transformers import WhisperForConditionalGeneration
folder = sys.argv[1]
whisper = WhisperForConditionalGeneration.from_pretrained(folder + "/base", dtype=torch.float32)
model = PeftModel.from_pretrained(whisper, folder + "/lora").eval()
features = torch.load(folder + "/features.pt")
with torch.no_grad():
    ids = torch.tensor([[257, 259, 97, 98]] * len(features))
    torch.save(model(input_features=features, decoder_input_ids=ids).logits, folder + "/logits.pt")
assert "peft_clsr" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=300)
    assert close(torch.load(tmp_path / "logits.pt"), logits_of(frozen.model, dataset))


def test_full_experts_are_approximated_at_a_rank_and_keep_their_biases(routed, freeze, base, dataset, tmp_path):
    model = routed(GATES)
    frozen = freeze(model)
    expected = logits_of(frozen.model, dataset)
    errors, distances = {}, {}
    for rank in (2, 8, 16):
        errors[rank] = frozen.save_as_lora(tmp_path / str(rank), rank=rank)
        lora = PeftModel.from_pretrained(base(), tmp_path / str(rank))
        distances[rank] = float((logits_of(lora, dataset) - expected).norm())
    assert 1 > errors[2] > errors[8] > errors[16] and errors[16] < 1e-5  # 16 is the size of the model
    assert distances[2] > distances[8] > 1e-2
    assert close(logits_of(lora, dataset), expected)
    config = json.loads((tmp_path / "2" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2 and config["lora_bias"] is True

    difference = {}
    for key in EXPERTS:
        layer = model.get_base_model().get_submodule(key)
        difference[key] = layer.clsr_expert["ca"].weight.detach() - layer.base_layer.weight
    weights = load_file(tmp_path / "2" / "adapter_model.safetensors")
    missed = [
        difference[key]
        - weights[f"base_model.model.{key}.lora_B.weight"] @ weights[f"base_model.model.{key}.lora_A.weight"]
        for key in EXPERTS
    ]
    norm = [sum(float(one.square().sum()) for one in tensors) ** 0.5 for tensors in (missed, difference.values())]
    assert errors[2] == pytest.approx(norm[0] / norm[1], rel=1e-4)


def test_modules_to_save_are_in_the_lora(routed, freeze, base, dataset, tmp_path):
    model = routed(GATES, expert_rank=3, modules_to_save=["model.encoder.layer_norm"])
    with torch.no_grad():
        model.get_base_model().model.encoder.layer_norm.modules_to_save["ca"].weight.mul_(2)
    frozen = freeze(model)
    frozen.save_as_lora(tmp_path)
    lora = PeftModel.from_pretrained(base(), tmp_path)
    expected = logits_of(frozen.model, dataset)
    assert close(logits_of(lora, dataset), expected)
    assert close(logits_of(lora.merge_and_unload(), dataset), expected)


def test_a_base_in_half_precision_gets_a_lora_in_that_of_the_experts(routed, freeze, base, tmp_path):
    freeze(routed([EXPERT] * 4, base=base().bfloat16(), expert_rank=3)).save_as_lora(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert len(weights) == 16


def test_the_frozen_model_stays_and_another_adapter_is_not_taken(routed, freeze, base, dataset, tmp_path):
    frozen = freeze(routed(GATES, adapters=("ro", "ca"), expert_rank=3))
    before = logits_of(frozen.model, dataset)
    frozen.save_as_lora(tmp_path)
    assert torch.equal(logits_of(frozen.model, dataset), before)
    assert close(logits_of(PeftModel.from_pretrained(base(), tmp_path), dataset), before)


@pytest.mark.parametrize(
    ("gates", "config", "rank", "message"),
    [
        (
            [EXPERT, MIXED, MIXED, SHARED],
            {"expert_rank": 3},
            None,
            r"2 of 4 modules are left routed.*undecided='loss'",
        ),
        ([SHARED] * 4, {"expert_rank": 3}, None, "would change nothing: use the base model"),
        (GATES, {"expert_rank": 3}, 2, "rank of the LoRA is 2, but the experts have rank 3, .*leave it out"),
        (GATES, {}, None, "rank of the LoRA is None, expected at least 1: the experts are full ones"),
        (GATES, {}, 17, "chosen rank 17 is larger than the weight shape"),
        (GATES, {}, 0.5, "rank of the LoRA is 0.5, expected at least 1"),
    ],
)
def test_what_a_lora_cannot_be_is_refused_and_nothing_written(routed, freeze, tmp_path, gates, config, rank, message):
    frozen = freeze(routed(gates, **config))
    with pytest.raises(ValueError, match=message):
        frozen.save_as_lora(tmp_path / "lora", rank=rank)
    assert not (tmp_path / "lora").exists()


def test_a_cut_context_is_refused_and_one_that_cuts_nothing_is_not(routed, freeze, tiny_whisper, tmp_path):
    long = tiny_whisper(init_std=0.5, max_source_positions=150, max_target_positions=20)
    frozen = freeze(routed(GATES, base=long, expert_rank=3, max_audio_seconds=1))
    with pytest.raises(ValueError, match="cut the context to 1 s, which a LoRA cannot carry.*--full_context"):
        frozen.save_as_lora(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    freeze(routed(GATES, expert_rank=3, max_audio_seconds=1)).save_as_lora(tmp_path / "lora")


def test_the_experts_of_the_model_that_was_frozen_are_kept(routed, freeze, base, dataset, tmp_path):
    model = routed(GATES, expert_rank=3)
    frozen = freeze(model)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, CLSRLayer):
                layer.clsr_expert_B["ca"].weight.zero_()
    model.delete_adapter("ca")
    frozen.save_as_lora(tmp_path)
    expected = logits_of(frozen.model, dataset)
    assert close(logits_of(PeftModel.from_pretrained(base(), tmp_path), dataset), expected)
    assert isinstance(frozen.experts.config, CLSRConfig)
