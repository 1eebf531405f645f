"""`peft-clsr languages`: what a repository or a folder has."""

from __future__ import annotations

import argparse
from pathlib import Path

from .table import markdown_table

DESCRIPTION = "list the languages of a repository on the Hub or of a folder"


def make_parser(prog: str, everything: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog, description="List the language experts of a repository or of a folder.")
    parser.add_argument("source", help="repository on the Hub, such as me/whisper-small-experts, or folder")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the repository; main by default")
    return parser


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    arguments = parser.parse_args(argv)

    from ..hub.pull import list_languages
    from ..hub.record import read_languages
    from ..sources import check_source, did_you_mean

    folder = Path(arguments.source)
    try:
        check_source(arguments.source, "SOURCE", "adapters")
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    try:
        if folder.is_dir():
            languages = read_languages(folder)
        else:
            languages = list_languages(arguments.source, revision=arguments.revision)
    except (OSError, ValueError) as error:  # the Hub's errors are of both kinds
        parser.exit(
            2, f"error: {arguments.source} is no folder here{did_you_mean(arguments.source)}; on the Hub: {error}\n"
        )
    if not languages:
        parser.exit(2, f"error: {arguments.source} has no adapter of a language\n")
    # One rate a language, the one to read.
    rates = [name for name in ("wer", "cer") if name == "wer" or any(entry.rate == name for entry in languages)]
    header = ["language", "name", "folder", "base model", "expert", "MB", *(f"{name.upper()} %" for name in rates)]
    rows = [
        [
            language.code,
            language.name,
            language.subfolder,
            language.base_model or "",
            "full" if language.rank is None else f"rank {language.rank}",
            "" if language.size is None else f"{language.size / 1e6:.1f}",
            *(
                "" if language.error_rate is None or language.rate != name else f"{100 * language.error_rate:.1f}"
                for name in rates
            ),
        ]
        for language in languages
    ]
    print(markdown_table(header, rows))
    return 0
