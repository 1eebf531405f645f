"""Options of a command in a YAML file: `--config file.yaml`."""

from __future__ import annotations

import argparse
import json
from typing import Any

import yaml


def split_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """
    Take `--config FILE` out of the arguments.

    Returns:
        `(str | None, list[str])`: the file, and the other arguments.

    Raises:
        ValueError: `--config` has no value, or comes twice.
    """
    files, others = [], []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name != "--config":
            others.append(argument)
        else:
            files.append(value if equals else next(rest, ""))
    if len(files) > 1 or "" in files:
        raise ValueError("--config expects one file, such as --config train.yaml")
    return (files[0] if files else None), others


def options_in_file(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """
    Read a YAML file of options as arguments for the parser. The parser then checks names and types.

    Args:
        path (`str`): A mapping of option names, without dashes, to values: numbers, text, true or false, or lists.
        parser (`argparse.ArgumentParser`): The command's.

    Returns:
        `list[str]`: the arguments, such as `["--learning_rate=2e-3", "--languages", "ca", "uk"]`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no YAML mapping, or an option has no value or a list instead of one.
    """
    with open(path, encoding="utf-8") as file:
        try:
            options = yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} holds no options, expected lines such as 'learning_rate: 2e-3'")
    actions = {option: action for action in parser._actions for option in action.option_strings}
    arguments = []
    for name, value in options.items():
        option = f"--{name}"
        if value is None:
            raise ValueError(f"{path}: {name} has no value: give one, or remove the line")
        if isinstance(value, list):
            if option in actions and actions[option].nargs in (None, 0, "?"):
                raise ValueError(f"{path}: {name} is a list, expected one value")
            arguments += [option, *map(_text, value)]
        elif isinstance(value, bool) and option in actions and actions[option].nargs == 0:  # a flag without a value
            if isinstance(actions[option], argparse.BooleanOptionalAction) and not value:
                option = f"--no-{name}"
            arguments += [option] * (value or option.startswith("--no-"))
        else:
            arguments.append(f"{option}={_text(value)}")
    return arguments


def _text(value: Any) -> str:
    """A value as the command line has it: true, JSON for mappings, and text as it is."""
    return json.dumps(value) if isinstance(value, (bool, dict)) else str(value)
