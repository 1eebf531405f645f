"""The help texts of all commands."""

from __future__ import annotations

import argparse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows an option by one name, its default if it has one, and the epilog as it is."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=118)

    def add_argument(self, action: argparse.Action) -> None:
        # HfArgumentParser adds a --no_x to each --x that is true by default.
        if not any(name.startswith("--no_") for name in action.option_strings):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        return action.option_strings[0] + (" ..." if action.nargs == "+" else "")

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default == [] or isinstance(action.default, bool) and action.nargs == 0:
            return action.help
        return super()._get_help_string(action)
