"""The layout of `--help`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows each option under its first name, its kind of value (N: whole number, X: number), and its default."""

    def __init__(self, prog: str, **kwargs) -> None:
        super().__init__(prog, max_help_position=32, **kwargs)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        # HfArgumentParser gives each option a second name, with dashes.
        names = {name.replace("-", "_"): name for name in reversed(action.option_strings)}
        return f"{', '.join(reversed(names.values()))} {_values(action)}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if default in (None, argparse.SUPPRESS, []) or default is False or "default" in text.lower():
            return text
        if isinstance(default, (list, tuple)):
            default = " ".join(map(str, default))
        return f"{text} (default: {str(default).replace('%', '%%')})"


def hide(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Leave options out of the help. They still work."""
    for action in parser._actions:
        if action.dest in names:
            action.help = argparse.SUPPRESS


def _values(action: argparse.Action) -> str:
    """How the help names the values of an option."""
    if action.nargs == 0:
        return ""
    if action.nargs == "?" and action.const is True:  # a switch that also takes true or false
        return "[true|false]" if action.default is True else ""
    name = action.metavar or ("N" if action.type is int else "X" if action.type is float else "TEXT")
    choices = list(map(str, action.choices or ()))
    if 0 < len(choices) <= 6:
        name = "{" + ",".join(choices) + "}"
    return f"{name} ..." if action.nargs in ("+", "*") else str(name)
