"""`peft-clsr languages`: lists the languages of a repository or folder."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = "list the languages of a repository on the Hub, or of a folder"


def make_parser(prog: str, everything: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("source", help="a repository, such as me/whisper-small-experts, or a folder of adapters")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub; main if not given")
    return parser


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    options = parser.parse_args(argv)
    from huggingface_hub.errors import HfHubHTTPError

    from ..hub.pull import list_languages
    from ..hub.record import read_languages
    from .table import format_table

    try:
        if Path(options.source).is_dir():
            languages = read_languages(Path(options.source))
        else:
            languages = list_languages(options.source, revision=options.revision)
    except (ValueError, OSError, HfHubHTTPError) as error:
        parser.exit(2, f"error: {error}\n")
    if not languages:
        parser.exit(2, f"error: {options.source} has no adapter of a language\n")
    header = ["code", "language", "folder", "base model", "expert", "size", "WER %"]
    rows = [
        [
            language.code,
            language.name,
            language.subfolder,
            language.base_model or "",
            "full" if language.rank is None else f"rank {language.rank}",
            "" if language.size is None else f"{language.size / 1e6:.1f} MB",
            "" if language.wer is None else f"{100 * language.wer:.1f}",
        ]
        for language in languages
    ]
    print(format_table(header, rows))
    return 0
