"""The command `peft-clsr`: its commands, help, `--config`, and small commands."""

import json
import os
import subprocess
import sys
import time

import pytest
from helpers import QUIET, randomize
from peft import get_peft_model

from peft_clsr import CLSRConfig, push_language
from peft_clsr.cli import main
from peft_clsr.cli.main import COMMANDS


def status_of(arguments):
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as error:
        return error.code


def test_the_overview_lists_all_commands(capsys):
    assert status_of([]) == status_of(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in COMMANDS)


def test_an_unknown_command_is_named_with_the_nearest(capsys):
    assert status_of(["trian"]) == 2
    assert "no command 'trian'; did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_torch_and_all_options_have_a_text(name):
    program = (
        "import sys; sys.argv = ['peft-clsr']; from peft_clsr.cli import main\n"
        f"main([{name!r}, '--help']); print('TORCH' if 'torch' in sys.modules else 'LIGHT')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "LIGHT" and len(lines) < 75
    assert main([name, "--help-all"]) == 0


@pytest.mark.performance
def test_help_is_quick():
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "peft_clsr", "train", "--help"], capture_output=True, check=True)
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 2


def test_help_all_has_the_arguments_of_the_trainer(capsys):
    assert status_of(["train", "--help"]) == 0
    assert "--gradient_checkpointing" not in capsys.readouterr().out
    assert status_of(["train", "--help-all"]) == 0
    printed = capsys.readouterr().out
    assert "--gradient_checkpointing" in printed and "--lora_rank" in printed and "(default: 0.002)" in printed


# ---------------------------------------------------------------- --config


def test_options_of_a_file_come_before_those_of_the_command_line(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("student: nobody/nothing\nlanguages: [ro, ca]\nlearning_rate: 1e-3\nuse_cpu: true\nseed:\n")
    options = ["--dataset", tmp_path, "--output_dir", tmp_path / "out", "--gate_budget", 2]
    assert status_of(["train", "--config", config, *options]) == 2
    assert "gate_budget is 2.0" in capsys.readouterr().err  # all else was read
    assert status_of(["train", "--config", config, *options, "--learning_rate", "x"]) == 2
    assert "--learning_rate/--learning-rate: invalid float value: 'x'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("learning_rat: 1", "the option 'learning_rat', which peft-clsr train does not have; did you mean"),
        ("- 1", "has no options"),
        ("a: [", "cannot be read"),
        ("num_train_epochs: many", "invalid float value: 'many'"),
    ],
)
def test_a_bad_file_is_named(tmp_path, capsys, text, error):
    (tmp_path / "run.yaml").write_text(text)
    assert status_of(["train", "--config", tmp_path / "run.yaml"]) == 2
    assert error in capsys.readouterr().err
    assert status_of(["train", "--config", tmp_path / "missing.yaml"]) == 2
    assert "missing.yaml cannot be read" in capsys.readouterr().err


def test_positional_arguments_and_flags_may_be_in_the_file(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(f"inputs: [{tmp_path / 'nothing'}]\nmodel: any\noverwrite: true\n")
    assert status_of(["transcribe", "--config", tmp_path / "a.yaml"]) == 2
    assert "nothing does not exist" in capsys.readouterr().err
    (tmp_path / "a.yaml").write_text("model: any\noverwrite: maybe\n")
    assert status_of(["transcribe", "--config", tmp_path / "a.yaml"]) == 2
    assert "overwrite in" in capsys.readouterr().err


# ---------------------------------------------------------------- a missing extra


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        (["train", "--student", "a", "--dataset", "b", "--languages", "ca", "--output_dir", "c"], "jiwer", "train"),
        (["transcribe", "a.wav", "--model", "b"], "pysubs2", "transcribe"),
        (
            ["export", "--base", "a", "--adapter", "b", "--language", "ca", "--dataset", "c", "--output_dir", "d"],
            "ctranslate2",
            "export",
        ),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, capsys, command, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    assert status_of(command) == 2
    assert f"{module} is not installed: pip install 'peft_clsr[{extra}]'" in capsys.readouterr().err


# ---------------------------------------------------------------- compare, push, languages


def write_run(folder, method, wer, context=4):
    rates = {"wer": wer, "cer": wer / 2, "utterances": 9, "skipped": 0}
    row = {
        "base": {**rates, "wer": 0.9, "cer": 0.8},
        method: rates,
        "trainable_parameters": 10**6,
        "trainable_share": 0.1,
    }
    folder.mkdir()
    results = {"settings": {"max_audio_seconds": None}, "languages": {"ro": {**row, "max_audio_seconds": context}}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_compare_shows_runs_in_one_table(tmp_path, capsys):
    runs = [write_run(tmp_path / "a", "expert", 0.25), write_run(tmp_path / "b", "lora", 0.5)]
    assert status_of(["compare", *runs]) == 0
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [row[2] for row in cells[2:]] == ["base, 4 s context", "with expert, 4 s context", "with LoRA, 4 s context"]
    assert [(row[3], row[-1]) for row in cells[2:]] == [("90.0", ""), ("25.0", str(runs[0])), ("50.0", str(runs[1]))]
    assert status_of(["compare", tmp_path]) == 2
    assert "has no results.json" in capsys.readouterr().err


def test_a_folder_is_pushed_and_its_languages_are_listed(tiny_whisper, hub, tmp_path, capsys):
    whisper = tiny_whisper()
    whisper.name_or_path = whisper.config._name_or_path = "me/tiny"
    model = get_peft_model(whisper, CLSRConfig(language="ro", expert_rank=2, gate_dim=8, **QUIET), adapter_name="ro")
    randomize(model).save_pretrained(tmp_path / "experts")
    assert status_of(["push", tmp_path / "experts", "me/experts"]) == 0
    assert hub.endpoint in capsys.readouterr().out
    push_language(model, "me/experts", "ro", metrics={"set": {"wer": 0.125}})
    for source in ("me/experts", tmp_path / "experts"):
        assert status_of(["languages", source]) == 0
        row = capsys.readouterr().out.splitlines()[2]
        assert [cell.strip() for cell in row.split("|")[1:6]] == ["ro", "Romanian", "ro", "me/tiny", "rank 2"]
        assert ("12.5" in row) == (source == "me/experts")
    assert status_of(["languages", "me/nothing"]) == 2
    assert status_of(["push", tmp_path, "me/experts"]) == 2
    assert "holds no adapter of a language" in capsys.readouterr().err


def test_the_module_and_the_script_are_one_command():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-m", "peft_clsr"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.startswith("usage: peft-clsr COMMAND")
