"""Options of a command in a YAML file: `--config file.yaml`."""

from __future__ import annotations

import argparse
import difflib
import json
import os
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


def arguments_in_file(path: str, parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """
    Read a YAML file of options as arguments for the parser. The parser then checks names and types.

    Args:
        path (`str`): A mapping of option names, without dashes, to values: numbers, text, true or false, or lists.
        parser (`argparse.ArgumentParser`): The command's.

    Returns:
        `(list[str], list[str])`: positional arguments, and options such as `["--seed=1", "--languages", "ca", "uk"]`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no YAML mapping, or an option has no value or a list instead of one.
    """
    if not os.path.isfile(path):
        raise ValueError(f"--config {path} is no file, expected a YAML file of options{_nearest_file(path)}")
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.load(file, _Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} has no options, expected lines such as 'learning_rate: 2e-3'")
    actions = {name: action for action in parser._actions for name in action.option_strings or [action.dest]}
    positional: list[str] = []
    options: list[str] = []
    for name, value in values.items():
        option = name if name in actions else f"--{name}"
        action = actions.get(option)
        if action is None:
            raise ValueError(
                f"unrecognized arguments: {option}={_text(value)} in {path}{nearest_option(option, parser)}"
            )
        if isinstance(value, dict) or not _takes_text(action):
            value = _with_booleans(value)
        if value is None:
            raise ValueError(f"{path}: {name} has no value: give one, or remove the line")
        if isinstance(value, list) and action.nargs in (None, 0, "?"):
            raise ValueError(f"{path}: {name} is a list, expected one value")
        if option == name:
            positional += map(_text, value if isinstance(value, list) else [value])
        elif isinstance(value, list):
            options += [option, *map(_text, value)]
        elif isinstance(value, bool) and action.nargs == 0:  # a flag without a value
            if value:
                options.append(option)
            elif isinstance(action, argparse.BooleanOptionalAction):
                options.append(f"--no-{name}")
        else:
            options.append(f"{option}={_text(value)}")
    return positional, options


class _Word(str):
    """A word that YAML 1.1 reads as a boolean, and YAML 1.2 as text: yes, no, on, off."""


class _Loader(yaml.SafeLoader):
    """Reads such words as text."""


def _word_or_boolean(loader: _Loader, node: yaml.ScalarNode) -> Any:
    is_boolean = node.value.lower() in ("true", "false")
    return loader.construct_yaml_bool(node) if is_boolean else _Word(node.value)


_Loader.add_constructor("tag:yaml.org,2002:bool", _word_or_boolean)


def _takes_text(action: argparse.Action) -> bool:
    """True if "no" is a text for the option, such as Norwegian, and not the value of a switch."""
    is_boolean = getattr(action.type, "__name__", "") == "string_to_bool"  # of transformers' HfArgumentParser
    return not is_boolean and action.nargs != 0 and action.const is not True


def _with_booleans(value: Any) -> Any:
    """The value with booleans for words such as "no", as YAML 1.1 has it."""
    if isinstance(value, _Word):
        return yaml.SafeLoader.bool_values[value.lower()]
    if isinstance(value, dict):
        return {key: _with_booleans(item) for key, item in value.items()}
    return [_with_booleans(item) for item in value] if isinstance(value, list) else value


def nearest_option(name: str, parser: argparse.ArgumentParser) -> str:
    """A remark about the option that is most similar to an unknown one; "" if there is none."""
    known = list(parser._option_string_actions)
    nearest = difflib.get_close_matches("--" + name.lstrip("-–—"), known, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else f"; all options: {parser.prog} --help-all"


def _nearest_file(path: str) -> str:
    folder, name = os.path.split(path)
    try:
        nearest = difflib.get_close_matches(name, os.listdir(folder or "."), n=1)
    except OSError:
        return ""
    return f"; did you mean {os.path.join(folder, nearest[0])}?" if nearest else ""


def _text(value: Any) -> str:
    """A value as the command line has it: true, JSON for mappings, and text as it is."""
    return json.dumps(value) if isinstance(value, (bool, dict)) else str(value)
