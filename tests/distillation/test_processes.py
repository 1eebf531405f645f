"""Two processes (gloo, on the CPU), once under `accelerate launch`. Recipes and two machines are launched, too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from scripts import train_distributed
from scripts.train_distributed import build_student, build_whisper
from two_processes import run_in_two_processes

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_distributed.py"
FSDP2 = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")
FSDP2 += ("--fsdp_transformer_layer_cls_to_wrap", "WhisperEncoderLayer,WhisperDecoderLayer")
FSDP2 += ("--fsdp_state_dict_type", "FULL_STATE_DICT", "--fsdp_cpu_ram_efficient_loading", "false")


def launch(*script):
    """FSDP is set by accelerate's launcher alone."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--num_processes", "2", "--dynamo_backend", "no", "--main_process_port", "0", *FSDP2]
    result = subprocess.run([*command, SCRIPT, *script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


def train(output, processes, *options, call=None):
    """The saved weights by language, and the logs. One process is the one of the tests."""
    script = [str(part) for part in (output, *options)]
    output.mkdir(exist_ok=True)
    if call is not None:
        call(*script)
    elif processes == 2:
        run_in_two_processes(train_distributed.main, script)
    else:
        train_distributed.main(script)
    run = json.loads((output / "run.json").read_text())
    assert run["processes"] == processes
    return {file.parent.name: load_file(file) for file in output.glob("*/adapter_model.safetensors")}, run["logs"]


def assert_same(one, other):
    assert one[0].keys() == other[0].keys()
    for language, weights in one[0].items():
        assert weights.keys() == other[0][language].keys()
        for name in weights:
            torch.testing.assert_close(other[0][language][name], weights[name], atol=1e-6, rtol=1e-5)
    for log, other_log in zip(one[1], other[1], strict=True):
        for part in ("loss", "ce_loss", "kd_loss", "budget_loss", "gate_mean"):
            assert other_log[part] == pytest.approx(log[part], abs=1e-4)


def test_two_processes_give_the_weights_of_one_with_twice_the_batch(tmp_path):
    """CE, KD and budget are those of both, of which the processes have unequal numbers of tokens; DDP finds no
    parameter unused, without looking for them. Gates are skipped; they are not in the tests below."""
    options = ("--skip_gate_prob", 0.5)
    one = train(tmp_path / "one", 1, "--batch_size", 4, *options)
    two = train(tmp_path / "two", 2, "--batch_size", 2, *options)
    assert_same(one, two)


TWO_LANGUAGES = ("--batch_size", 2, "--languages", "ca", "uk")


@pytest.fixture(scope="module")
def one_process_of_two_languages(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one"), 1, "--accumulation", 2, *TWO_LANGUAGES)


def test_each_process_on_another_language_gives_the_weights_of_one_process(one_process_of_two_languages, tmp_path):
    two = train(tmp_path, 2, *TWO_LANGUAGES)
    assert two[0].keys() == {"ca", "uk"}
    assert_same(one_process_of_two_languages, two)


def test_a_language_that_no_process_saw_in_a_step_does_not_move_by_a_bit(tmp_path):
    """Nor by momentum and weight decay, and no module that was skipped needs a search for unused parameters."""
    languages = ("uk", *["ca"] * 7)  # the first batch of both processes is "ca"
    options = ("--batch_size", 2, "--skip_gate_prob", 0.5, "--optim", "adamw_torch", "--max_steps", 1)
    weights, _ = train(tmp_path / "two", 2, "--languages", *languages, *options)
    start = build_student(["uk", "ca"], 0.0)
    for language, is_trained in (("uk", False), ("ca", True)):
        for name, weight in weights[language].items():
            before, _, last = name.rpartition(".")
            if last == "weight":  # biases have no weight decay, and gradients of zero where they were skipped
                assert torch.equal(weight, start.get_parameter(f"{before}.{language}.{last}")) != is_trained


def test_accumulation_on_two_processes_gives_the_weights_of_one_batch(tmp_path):
    one = train(tmp_path / "one", 1, "--batch_size", 8)
    two = train(tmp_path / "two", 2, "--batch_size", 2, "--accumulation", 2)
    assert_same(one, two)


def test_two_processes_resumed_in_the_middle_of_a_later_epoch_end_with_the_same_weights(tmp_path):
    """Order of batches, skipped gates and noise included, of which each process has its own."""
    options = (*TWO_LANGUAGES, "--skip_gate_prob", 0.3, "--gate_noise", 5.0, "--max_steps", 4)
    whole, _ = train(tmp_path / "whole", 2, *options)
    checkpoint = tmp_path / "whole" / "trainer" / "checkpoint-3"
    resumed, _ = train(tmp_path / "resumed", 2, *options, "--resume_from_checkpoint", checkpoint)
    for language, weights in whole.items():
        for name, weight in weights.items():
            assert torch.equal(resumed[language][name], weight)


def test_adapters_trained_and_saved_under_fsdp2_load_in_one_process(one_process_of_two_languages, tmp_path):
    two = train(tmp_path, 2, *TWO_LANGUAGES, call=launch)
    assert_same(one_process_of_two_languages, two)
    trained = build_student(["ca", "uk"], 0.0).eval()
    loaded = PeftModel.from_pretrained(build_whisper(0), tmp_path / "ca", adapter_name="ca").eval()
    features, ids = torch.randn(1, 80, 100), torch.tensor([[1, 5, 7]])
    with torch.no_grad():
        for name, weight in two[0]["ca"].items():
            before, _, last = name.rpartition(".")
            trained.get_parameter(f"{before}.ca.{last}").copy_(weight)
        expected = trained(input_features=features, decoder_input_ids=ids).logits
        torch.testing.assert_close(loaded(input_features=features, decoder_input_ids=ids).logits, expected)
