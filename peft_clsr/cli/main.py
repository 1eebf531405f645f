"""Entry point of `peft-clsr`: finds the command, and handles `--help`, `--help-all` and `--config`."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
import warnings
from itertools import takewhile
from types import ModuleType

from .config_file import arguments_in_file, nearest_option, split_config
from .help import HelpFormatter

PROG = "peft-clsr"
# Each is a module of this folder with DESCRIPTION, make_parser() and run(). None imports torch before it works.
COMMANDS = ("train", "compare", "transcribe", "app", "serve", "pseudo-label", "export", "convert", "push", "languages")


def main(argv: list[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`list[str]`, *optional*): The command's name and its arguments. By default those of the process.

    Returns:
        `int`: the exit status.

    Raises:
        SystemExit: for bad arguments, with status 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    name, *arguments = argv
    if name not in COMMANDS:
        (nearest,) = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0)
        print(f"error: {PROG} has no command {name!r}; did you mean {nearest!r}? All: {PROG} --help", file=sys.stderr)
        return 2
    command = _module(name)
    if "-h" in arguments or "--help" in arguments:
        _parser(command, name).print_help()
        return 0
    everything = _parser(command, name, everything=True)
    if "--help-all" in arguments:
        everything.print_help()
        return 0
    return _run(command, everything, arguments)


def run_and_exit() -> None:
    """The program `peft-clsr`: ends the process, at Ctrl-C without a traceback."""
    try:
        status = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130  # as shells have it
    sys.exit(status)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{name.replace('-', '_')}", __package__)


def _run(command: ModuleType, parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    try:
        config, arguments = split_config(arguments)
        if config is not None:
            # Positional arguments come first: an option with several values would take those that follow it.
            first = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
            positional, options = arguments_in_file(config, parser)
            arguments = positional + arguments[:first] + options + arguments[first:]
        _check_names(parser, arguments)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")

    from huggingface_hub.errors import HTTPError

    if not getattr(command, "REGISTERS_ITSELF", False):
        from ..registration import register

        register()
    if not sys.warnoptions:  # of libraries among each other: nothing that a user of the command could mend
        warnings.simplefilter("ignore", FutureWarning)
    try:
        return command.run(parser, arguments)
    except HTTPError as error:  # of the connection; commands handle the Hub's answers
        parser.exit(1, f"error: the Hub cannot be reached ({error}): check the connection, and try again\n")
    except ModuleNotFoundError as error:
        if "peft_clsr[" not in str(error):  # no extra of ours
            raise
        parser.exit(2, f"error: {error}\n")


def _check_names(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Raise a `ValueError` for an option that the command does not have."""
    for position, argument in enumerate(arguments):
        if argument == "--":
            return
        # A dash copied from a web page may be a longer one.
        if argument[:1] in ("-", "–", "—") and len(argument) > 1 and not _is_number(argument):
            name = argument.partition("=")[0]
            if name not in parser._option_string_actions:
                values = takewhile(lambda value: not value.startswith("-"), arguments[position + 1 :])
                unknown = " ".join([argument, *values])
                raise ValueError(f"unrecognized arguments: {unknown}{nearest_option(name, parser)}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parser(command: ModuleType, name: str, everything: bool = False) -> argparse.ArgumentParser:
    """The parser of a command, with the options that all commands have."""
    parser = command.make_parser(f"{PROG} {name}", everything=everything)
    parser.formatter_class = HelpFormatter
    parser.allow_abbrev = False  # main() would not recognize a shortened --config
    # Only for the help: main() has handled them when a command parses its arguments.
    parser.add_argument("--help-all", action="store_true", default=argparse.SUPPRESS, help="show all options and exit")
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        default=argparse.SUPPRESS,
        help="read options from a file, such as 'learning_rate: 2e-3'",
    )
    return parser


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"usage: {PROG} COMMAND [options]", "", "Language experts for Whisper.", ""]
    for name in COMMANDS:
        lines.append(f"  {name:{width}}  {_module(name).DESCRIPTION}")
    return "\n".join([*lines, "", f"Options of a command: {PROG} COMMAND --help, and all of them: --help-all"])
