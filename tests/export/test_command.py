"""`peft-clsr export`: what it prints and writes, and what it refuses."""

import importlib
import json
import re
import sys

import pytest
import torch
from freezing import EXPERT, MIXED, MODULES, SHARED
from peft import PeftModel
from transformers import WhisperForConditionalGeneration

from peft_clsr.cli.export import FORMATS, make_parser

REQUIRED = ("base", "adapter", "language", "dataset", "output_dir")


def table(printed):
    """The rows of printed tables, by their first cell."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize(("arguments", "positions"), [([], 50), (["--full_context"], 150)])
def test_the_command_exports_at_the_context_of_the_adapter_or_of_the_base(export, tmp_path, arguments, positions):
    status, printed = export([EXPERT, SHARED, MIXED, EXPERT], "--undecided", "majority", *arguments)
    assert status == 0, printed
    rows = table(printed)
    assert {"with the expert, routed", "frozen", "frozen, faster-whisper float32"} <= rows.keys()
    assert re.search(r"Measured on \d recordings: with so few, ", printed)
    assert rows[MODULES[1]] == ["0.0", "0.0", "shared"]
    assert json.loads((tmp_path / "out" / "whisper" / "config.json").read_text())["max_source_positions"] == positions
    names = {path.name for path in (tmp_path / "out" / "ctranslate2").iterdir()}
    assert {"model.bin", "config.json", "tokenizer.json", "preprocessor_config.json"} <= names


def test_the_command_writes_nothing_where_modules_are_left_routed(export, tmp_path):
    status, printed = export([EXPERT, SHARED, MIXED, EXPERT], "--undecided", "routed")
    assert status == 1 and "1 of 4 modules are left routed" in printed and "--undecided loss" in printed
    assert "| with the expert, routed | " in printed
    assert not (tmp_path / "out").exists()


def test_the_command_keeps_what_is_there_and_names_bad_values(export, tmp_path):
    for arguments, message in (
        (["--max_new_tokens", 225], "expected 1 to 224"),
        (["--threshold", 0.3], "threshold is 0.3"),
        (["--language", "uk"], "language 'uk' has no adapter"),
        (["--adapter", tmp_path / "base"], "adapter_config.json"),
        (["--adapter", tmp_path / "adaptors" / "ca"], f"did you mean '{tmp_path}/adapters/ca'"),
        (["--base", tmp_path / "adapters" / "ca"], "is an adapter, expected a whole Whisper"),
        (["--quantization", "int3"], "--quantization is 'int3', expected one of int8, "),
        (["--batch_size", 0], "--batch_size is 0"),
        (
            ["--lora_rank", 3],
            "--lora_rank changes nothing in --format ctranslate2: leave it out, or take --format lora",
        ),
        (["--recover_steps", -1], "--recover_steps is -1, expected at least 0"),
        (["--recover_steps", 1, "--recover_learning_rate", 0], "--recover_learning_rate is 0.0, expected above 0"),
        (
            ["--recover_learning_rate", 0.05],
            "--recover_learning_rate changes nothing without --recover_steps: leave it out, or give --recover_steps",
        ),
        (
            ["--recover_split", "validation"],
            "--recover_split changes nothing without --recover_steps: leave it out, or give --recover_steps",
        ),
        (["--recover_steps", 1, "--recover_split", "trian"], "trian"),
    ):
        status, printed = export([EXPERT] * 4, *arguments)
        assert status == 2 and message in printed, printed
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    status, printed = export([EXPERT] * 4)
    assert status == 2 and "out is not an empty folder" in printed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


# ---------------------------------------------------------------- LoRA


@pytest.fixture
def no_ctranslate2(export, monkeypatch):
    for name in ("ctranslate2", "faster_whisper"):
        monkeypatch.setitem(sys.modules, name, None)


@torch.no_grad()
def logits(model, generator_seed=0):
    features = torch.randn(1, 80, 300, generator=torch.Generator().manual_seed(generator_seed))
    return model.eval()(input_features=features, decoder_input_ids=torch.tensor([[257, 259, 97]])).logits


@pytest.mark.parametrize("rank", [3, 17])  # the full rank is 16, but a low-rank expert is exact at any
def test_the_command_writes_a_lora_beside_the_whisper_without_ctranslate2(rank, export, no_ctranslate2, tmp_path):
    status, printed = export(
        [EXPERT, SHARED, EXPERT, EXPERT], "--format", "lora", expert_rank=rank, max_audio_seconds=None
    )
    assert status == 0, printed
    rows = table(printed)
    assert rows["with the expert, routed"] == rows["frozen"] == rows["base with the LoRA"]
    assert "3 of 3 transcripts of the LoRA equal those of the frozen model" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["lora", "whisper"]
    base, frozen = (
        WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        for folder in (tmp_path / "base", tmp_path / "out" / "whisper")
    )
    lora = PeftModel.from_pretrained(base, tmp_path / "out" / "lora")
    assert torch.allclose(logits(lora), logits(frozen), atol=1e-5)
    config = json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_full_experts_become_a_lora_of_the_rank_asked_for_at_a_cost_that_is_said(export, no_ctranslate2, tmp_path):
    arguments = ["--format", "lora", "--full_context", "--lora_rank", 2]
    status, printed = export([EXPERT, SHARED, EXPERT, EXPERT], *arguments)
    assert status == 0, printed
    assert "relative error of the LoRA's weights: 0." in printed
    assert json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())["r"] == 2


def test_what_cannot_be_a_lora_is_refused_before_anything_is_measured(export, no_ctranslate2, tmp_path):
    for arguments, config, message in (
        ([], {"expert_rank": 3}, "cut the context to 1 s, which a LoRA cannot carry"),
        (["--full_context"], {}, "the experts are full ones"),
        (["--full_context", "--lora_rank", 17], {}, "--lora_rank is 17, expected at most the full rank, 16"),
        (["--full_context", "--lora_rank", 2], {"expert_rank": 3}, "leave it out"),
        (["--quantization", "int8"], {"expert_rank": 3}, "--quantization changes nothing in --format lora"),
    ):
        status, printed = export([EXPERT] * 4, "--format", "lora", *arguments, **config)
        assert status == 2 and message in printed, printed
        assert "gate means" not in printed and not (tmp_path / "out").exists()


def test_each_format_has_a_module_and_options_that_exist():
    parser = make_parser("peft-clsr export")
    for name, chosen in FORMATS.items():
        assert callable(importlib.import_module(f"peft_clsr.cli.{chosen.module}").export), name
        for option in chosen.options:
            assert option in vars(parser.parse_args([f"--{needed}=x" for needed in REQUIRED])), option


# ---------------------------------------------------------------- recovery


def test_steps_after_freezing_are_a_row_of_the_table_and_change_what_is_written(export, no_ctranslate2, tmp_path):
    written = {}
    for steps, training in ((0, []), (4, ["--recover_steps", 4, "--recover_learning_rate", 0.05])):
        arguments = ["--format", "lora", *training]
        arguments += ["--undecided", "majority", "--output_dir", tmp_path / f"out{steps}"]
        status, printed = export([EXPERT, MIXED, MIXED, SHARED], *arguments, expert_rank=3, max_audio_seconds=None)
        assert status == 0, printed
        assert ("frozen, after 4 steps" in table(printed)) is (steps > 0)
        whisper = WhisperForConditionalGeneration.from_pretrained(tmp_path / f"out{steps}" / "whisper")
        written[steps] = logits(whisper.float())
        config = json.loads((tmp_path / f"out{steps}" / "lora" / "adapter_config.json").read_text())
        decisions = [row[2] for name, row in table(printed).items() if name in MODULES]
        assert decisions[0] == "expert" and decisions[3] == "shared"
    assert (written[4] - written[0]).abs().max() > 1e-3
    assert sorted(config["target_modules"]) == sorted(
        key.replace("fc1", fc) for key in MODULES for fc in ("fc1", "fc2")
    )


def test_a_student_at_a_cut_context_is_taught_too(export, tmp_path):
    arguments = ["--recover_steps", 1, "--undecided", "majority"]
    status, printed = export([EXPERT, MIXED, MIXED, SHARED], *arguments, expert_rank=3)
    assert status == 0, printed
    assert {"frozen, after 1 steps", "frozen, faster-whisper float32"} <= table(printed).keys()
