"""Chooses the command, and handles the options that all commands have."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMANDS = ("train", "transcribe", "compare", "export", "push", "languages", "convert")

_COMMON_OPTIONS = """\
options of every command:
  --config FILE.yaml  read options from a file: option names and values. Options on the command line win
  --help              show the main options
  --help-all          show all options
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run `peft-clsr`.

    Args:
        arguments (`Sequence[str]`, *optional*): Those of the command line by default.

    Returns:
        `int`: the exit status. 2 is bad input; the meaning of 1 depends on the command.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "--help-all"):
        print(_overview())
        return 0
    name, arguments = arguments[0], arguments[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(COMMANDS)}"
        print(f"error: peft-clsr has no command {name!r}; {hint}", file=sys.stderr)
        return 2
    command = importlib.import_module(f".{name}", __package__)
    prog = f"peft-clsr {name}"
    if "--help-all" in arguments:
        print(command.make_parser(prog, everything=True).format_help() + "\n" + _COMMON_OPTIONS, end="")
        return 0
    if "-h" in arguments or "--help" in arguments:
        print(command.make_parser(prog).format_help() + "\n" + _COMMON_OPTIONS, end="")
        return 0

    from ..registration import register

    register()
    parser = command.make_parser(prog, everything=True)
    return command.run(parser, _with_config_file(parser, arguments))


def _overview() -> str:
    lines = ["usage: peft-clsr COMMAND [options]", "", "Language experts for Whisper.", "", "commands:"]
    for name in COMMANDS:
        lines.append(f"  {name:<12}{importlib.import_module(f'.{name}', __package__).DESCRIPTION}")
    return "\n".join([*lines, "", "`peft-clsr COMMAND --help` shows the options of a command."])


def _with_config_file(parser: argparse.ArgumentParser, arguments: list[str]) -> list[str]:
    """Replace `--config FILE` by the options in the file. They come first, so that the command line wins."""
    config_parser = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", type=Path)
    found, rest = config_parser.parse_known_args(arguments)
    if found.config is None:
        return rest
    import yaml

    try:
        values = yaml.safe_load(found.config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.exit(2, f"error: --config {found.config} cannot be read: {error}\n")
    if not isinstance(values, dict):
        parser.exit(
            2, f"error: --config {found.config} has no options, expected lines such as 'learning_rate: 2e-3'\n"
        )
    options: list[str] = []
    positionals: list[str] = []
    for name, value in values.items():
        given, is_positional = _as_arguments(parser, str(name), value, found.config)
        (positionals if is_positional else options).extend(given)
    return [*options, *rest, *positionals]


def _as_arguments(parser: argparse.ArgumentParser, name: str, value: Any, path: Path) -> tuple[list[str], bool]:
    """The command-line arguments for an option of the file, and `True` if it is a positional argument."""
    values = [str(item) for item in (value if isinstance(value, list) else [value])]
    if any(action.dest == name and not action.option_strings for action in parser._actions):
        return values, True
    action = parser._option_string_actions.get(f"--{name}")
    if action is None:
        near = difflib.get_close_matches(f"--{name}", parser._option_string_actions, n=1)
        hint = f"; did you mean {near[0].removeprefix('--')!r}?" if near else ""
        parser.exit(2, f"error: {path} has the option {name!r}, which {parser.prog} does not have{hint}\n")
    if value is None:
        return [], False
    if action.nargs == 0:  # a flag without value
        if not isinstance(value, bool):
            parser.exit(2, f"error: {name} in {path} is {value!r}, expected true or false\n")
        return ([f"--{name}"] if value else []), False
    return [f"--{name}", *values], False
