"""`peft-clsr`: finding commands, help without torch, and options from a file."""

import argparse
import re
import subprocess
import sys
import time
import types
from dataclasses import dataclass, field
from typing import Literal

import pytest
from transformers import HfArgumentParser

from peft_clsr.cli import main
from peft_clsr.cli.main import COMMANDS, PROG
from peft_clsr.cli.train import make_parser

# Prints the modules that commands must not import for their help.
LIGHT = """
import sys
sys.orig_argv = ["python", "-m", "peft_clsr"]
from peft_clsr.cli import main
main(["--help"])
for name in sys.argv[1:]:
    main([name, "--help"])
    print(name, {"torch", "peft", "datasets", "accelerate"} & set(sys.modules))
"""


def test_without_a_command_all_commands_are_listed(capsys):
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert all(f"\n  {name} " in printed for name in COMMANDS)


def test_an_unknown_command_is_named_with_the_nearest_one(capsys):
    assert main(["trian"]) == 2
    assert "no command 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_help_imports_no_torch():
    done = subprocess.run([sys.executable, "-c", LIGHT, *COMMANDS], capture_output=True, text=True)
    for name in COMMANDS:
        assert f"\n{name} set()\n" in done.stdout, done.stdout + done.stderr


@pytest.mark.performance
def test_help_answers_within_two_seconds():
    seconds = []
    for _ in range(2):  # the first one may compile
        started = time.perf_counter()
        command = [sys.executable, "-m", "peft_clsr", "train", "--help"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds.append(time.perf_counter() - started)
    assert "--learning_rate X" in printed
    assert min(seconds) < 2


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_two_screens(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main([name, "--help"]) == 0
    short = capsys.readouterr().out
    assert short.startswith(f"usage: {PROG} {name} ") and len(short.splitlines()) <= 60
    assert main([name, "--help-all"]) == 0
    assert set(short.split()) & {"--help-all", "--config"} == {"--help-all", "--config"}
    assert len(capsys.readouterr().out) >= len(short)


def test_every_option_of_train_has_a_help_text():
    assert not [action.dest for action in make_parser("train", everything=True)._actions if not action.help]


def test_the_full_help_of_train_shows_every_option(capsys):
    assert main(["train", "--help-all"]) == 0
    shown = capsys.readouterr().out
    options = {action.dest for action in make_parser("train", everything=True)._actions}
    assert not [name for name in options if not re.search(f"--{name.replace('_', '[-_]')}\\b", shown)]


def test_the_short_help_of_train_has_the_defaults_that_are_used():
    short, full = make_parser("train"), make_parser("train", everything=True)
    names = {action.dest for action in short._actions}
    assert {name: short.get_default(name) for name in names} == {name: full.get_default(name) for name in names}


# ------------------------------------------------------------------------------------------------------ --config FILE


@dataclass
class Options:
    rate: float = 0.1
    name: str = "none"
    half: bool = False
    logged: bool = True
    many: list[str] = field(default_factory=list)
    extra: str = "{}"
    kind: Literal["no", "steps"] = "steps"
    sure: bool | None = None


@pytest.fixture
def command(monkeypatch):
    """Runs a command with options of all kinds; returns what it parsed."""
    parsed = []

    def parser_of_all_kinds(prog, everything=False):
        parser = HfArgumentParser(Options, prog=prog)
        parser.add_argument("files", nargs="*")
        parser.add_argument("--flag", action="store_true")
        parser.add_argument("--cache", action=argparse.BooleanOptionalAction, default=True)
        return parser

    def run(parser, argv):
        parsed.append(parser.parse_args(argv))
        return 0

    module = types.SimpleNamespace(make_parser=parser_of_all_kinds, run=run)
    monkeypatch.setattr("importlib.import_module", lambda name, package=None: module)

    def call(*arguments):
        assert main(["train", *map(str, arguments)]) == 0
        return parsed.pop()

    return call


def write(tmp_path, text):
    (tmp_path / "options.yaml").write_text(text)
    return tmp_path / "options.yaml"


def test_a_file_gives_options_of_all_kinds(command, tmp_path):
    file = write(
        tmp_path,
        "rate: 2e-3\nname: -x\nhalf: true\nlogged: false\nmany: [ca, uk]\nextra: {a: 1}\nflag: true\ncache: false\n",
    )
    options = command("--config", file)
    assert (options.rate, options.name, options.half, options.logged) == (0.002, "-x", True, False)
    assert (options.many, options.extra, options.flag, options.cache) == (["ca", "uk"], '{"a": 1}', True, False)
    assert command(f"--config={file}") == options


def test_no_and_on_are_texts_of_options_that_take_text(command, tmp_path, capsys):
    """YAML 1.1 has them as booleans: "no" is Norwegian, and a strategy of transformers."""
    texts = "name: off\nkind: no\nmany: [no, Yes]\nfiles: [on]\nextra: {a: no, b: [on], c: 'no'}\n"
    switches = "half: yes\nlogged: Off\nsure: on\nflag: ON\ncache: no\n"
    options = command("--config", write(tmp_path, texts + switches))
    assert (options.name, options.kind, options.many, options.files) == ("off", "no", ["no", "Yes"], ["on"])
    assert options.extra == '{"a": false, "b": [true], "c": "no"}'
    assert (options.half, options.logged, options.sure) == (True, False, True)
    assert (options.flag, options.cache) == (True, False)
    assert command("--config", write(tmp_path, "name: true\nhalf: 'no'")).name == "true"
    with pytest.raises(SystemExit):  # as on the command line, so that a type of its own may take "off"
        command("--config", write(tmp_path, "rate: off\n"))
    assert "invalid float value: 'off'" in capsys.readouterr().err


def test_options_of_the_command_line_replace_those_of_the_file(command, tmp_path):
    file = write(tmp_path, "rate: 1\nhalf: true\nmany: [ca, uk]\nflag: false\n")
    options = command("a.wav", "b.wav", "--config", file, "--rate", 2, "--half", "false", "--many", "ro")
    assert (options.rate, options.half, options.many, options.flag) == (2, False, ["ro"], False)
    assert options.files == ["a.wav", "b.wav"]
    assert command("--config", file, "a.wav").files == ["a.wav"]
    assert command("--config", write(tmp_path, "many: [ca]\nfiles: [a.wav, b.wav]\n"), "c.wav").files == [
        "a.wav",
        "b.wav",
        "c.wav",
    ]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rte: 1\n", "unrecognized arguments: --rte=1 in {file}; did you mean --rate?"),
        ("xyz: 1\n", "unrecognized arguments: --xyz=1 in {file}; all options: peft-clsr train --help-all"),
        ("rate: fast\n", "argument --rate: invalid float value: 'fast'"),
        ("rate: [1, 2]\n", "rate is a list, expected one value"),
        ("rate:\n", "rate has no value"),
        ("rate\n", "has no options"),
        ("{", "cannot be read as YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(command, tmp_path, capsys, text, named):
    file = write(tmp_path, text)
    with pytest.raises(SystemExit) as exit:
        command("--config", file)
    assert exit.value.code == 2 and named.replace("{file}", str(file)) in capsys.readouterr().err


def test_a_file_that_is_missing_is_named(command, tmp_path, capsys):
    file = write(tmp_path, "rate: 1\n")
    for arguments, named in (
        (
            ("--config", tmp_path / "option.yaml"),
            f"option.yaml is no file, expected a YAML file of options; did you mean {file}?",
        ),
        (
            ("--config", tmp_path / "none" / "options.yaml"),
            "options.yaml is no file, expected a YAML file of options\n",
        ),
        (("--config", tmp_path), f"--config {tmp_path} is no file"),
        (("--config",), "--config expects one file"),
    ):
        with pytest.raises(SystemExit) as exit:
            command(*arguments)
        assert exit.value.code == 2 and named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ["train", "--leraning_rate", "1"],
            "unrecognized arguments: --leraning_rate 1; did you mean --learning_rate?",
        ),
        (["train", "--leraning_rate=1"], "unrecognized arguments: --leraning_rate=1; did you mean --learning_rate?"),
        (["train", "-learning_rate", "1"], "unrecognized arguments: -learning_rate 1; did you mean --learning_rate?"),
        (["train", "–learning_rate", "1"], "did you mean --learning_rate?"),  # a dash from a web page
        (
            ["transcribe", "a.wav", "--output-dir", "out"],
            "unrecognized arguments: --output-dir out; did you mean --output_dir?",
        ),
        (["push", "a", "b", "--privat"], "did you mean --private?"),
        (["languages", "a", "--xyz"], "unrecognized arguments: --xyz; all options: peft-clsr languages --help-all"),
    ],
    ids=str,
)
def test_a_mistyped_option_is_named_with_the_nearest_one(arguments, named, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    printed = capsys.readouterr().err
    assert exit.value.code == 2 and named in printed and len(printed.splitlines()) == 1


def test_negative_numbers_and_values_after_an_equals_sign_are_values(command):
    options = command("--rate", "-0.5", "--name=--half")
    assert (options.rate, options.name) == (-0.5, "--half")


def test_options_are_not_recognized_by_their_beginnings(command, tmp_path, capsys):
    """A shortened --config would be ignored."""
    with pytest.raises(SystemExit):
        command("--conf", write(tmp_path, "rate: 1\n"))
    assert "unrecognized arguments: --conf" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- extras


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        ("train --student a --dataset b --languages ca --output_dir c", "jiwer", "train"),
        ("transcribe a.wav --model b", "soundfile", "train"),
        ("export --base a --adapter b --language ca --dataset c --output_dir d", "ctranslate2", "export"),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, capsys, command, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as exit:
        main(command.split())
    assert exit.value.code == 2
    assert f"{module} is not installed: pip install 'peft_clsr[{extra}]'" in capsys.readouterr().err


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "peft_clsr"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: peft-clsr COMMAND")
