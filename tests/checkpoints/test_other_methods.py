"""Importing peft_clsr changes nothing for adapters of other PEFT methods."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.config import PeftConfigMixin
from safetensors.torch import load_file

SIZES = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12}


@pytest.fixture
def lora(tiny_whisper, tmp_path):
    """A folder `base`, and a function that saves a LoRA adapter of it in a folder, with changes to its config."""
    tiny_whisper(**SIZES).save_pretrained(tmp_path / "base")

    def save(name, **values):
        folder = tmp_path / name
        base = tiny_whisper(**SIZES)
        base.name_or_path = str(tmp_path / "base")
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return folder

    return save


HUGE = {"auto_mapping": {"base_model_class": "W" * 5 * 2**20}}


def test_a_config_of_5_mb_is_what_peft_reads(lora, tiny_whisper):
    folder = lora("huge", **HUGE)
    path = str(folder / "adapter_config.json")
    unguarded = PeftConfigMixin.from_json_file.__func__.__wrapped__
    assert PeftConfig.from_json_file(path) == unguarded(PeftConfig, path)
    assert PeftConfig.from_pretrained(folder).auto_mapping == HUGE["auto_mapping"]
    assert PeftModel.from_pretrained(tiny_whisper(**SIZES), folder).active_adapters == ["default"]


def test_the_guard_returns_the_very_object_of_peft(lora, monkeypatch):
    from peft_clsr.checkpoints.guards import _guard_config

    attributes = {"peft_type": "LORA"}
    path = lora("good") / "adapter_config.json"
    assert _guard_config(lambda cls, path: attributes)(PeftConfig, path) is attributes


def test_results_and_errors_are_those_without_peft_clsr(lora, tmp_path):
    lora("good")
    lora("huge", **HUGE)
    lora("clsr in a value", auto_mapping={"peft_type": "CLSR"})
    lora("of an unknown method", peft_type="NOT A METHOD")
    pickle = lora("pickle")
    torch.save(load_file(pickle / "adapter_model.safetensors"), pickle / "adapter_model.bin")
    (pickle / "adapter_model.safetensors").unlink()
    damaged = lora("damaged") / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for name, text in {"nested": "[" * 10**6, "no JSON": "r: 4", "no UTF-8": "\ud8ff", "a list": "[]"}.items():
        (lora(name) / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    (lora("no config") / "adapter_config.json").unlink()
    script = str(Path(__file__).with_name("other_methods.py"))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    # One folder for both, as errors have it in them.
    runs = [
        subprocess.run(
            [sys.executable, script, str(tmp_path), *modules], capture_output=True, text=True, env=environment
        )
        for modules in ([], ["peft_clsr"])
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[-1].stderr
    without, with_import = (json.loads(run.stdout.splitlines()[-1]) for run in runs)
    assert isinstance(without["huge: from_pretrained"], dict) and "RecursionError" in without["nested: config"]
    assert with_import == without
