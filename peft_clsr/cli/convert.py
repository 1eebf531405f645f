"""`peft-clsr convert`: an expert of the reference implementation becomes an adapter folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from .help import HelpFormatter

DESCRIPTION = "convert an expert of naver/multilingual-distilwhisper-* to an adapter folder"


def make_parser(prog: str, everything: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("path", type=Path, help="the pickle, such as expert.catalan.bin; none of its code is run")
    parser.add_argument("output_dir", type=Path, help="the adapter folder to create")
    parser.add_argument("--language", help="code or English name; by default the language of the file")
    parser.add_argument(
        "--base_model_name_or_path", default="openai/whisper-small", help="the base model, for the adapter's config"
    )
    return parser


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    options = parser.parse_args(argv)
    from ..checkpoints.convert_naver import convert_naver_expert

    try:
        print(f"wrote {convert_naver_expert(**vars(options))}")
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    return 0
