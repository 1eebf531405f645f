"""The layout of `--help`."""

from __future__ import annotations

import argparse


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows each option once, under its first name, and its default after its help text."""

    def __init__(self, prog: str, **kwargs) -> None:
        super().__init__(prog, max_help_position=34, **kwargs)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = action.option_strings
        # HfArgumentParser gives each option a second name, with dashes.
        names = [name for i, name in enumerate(names) if name.replace("-", "_") not in _underscored(names[:i])]
        if action.nargs == 0:
            return ", ".join(names)
        return f"{', '.join(names)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if default in (None, argparse.SUPPRESS, "") or default is False or "default" in text.lower():
            return text
        if isinstance(default, (list, tuple)):
            default = " ".join(map(str, default))
        return f"{text} (default: {str(default).replace('%', '%%')})"


def _underscored(names: list[str]) -> set[str]:
    return {name.replace("-", "_") for name in names}
