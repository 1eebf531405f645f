"""`peft-clsr convert`: an expert of the reference implementation as an adapter."""

from __future__ import annotations

import argparse
import os

DESCRIPTION = "convert an expert of the reference implementation to an adapter"


def make_parser(prog: str, everything: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog, description="Convert an expert of naver/multilingual-distilwhisper-* to a PEFT adapter's folder."
    )
    parser.add_argument("path", help="the pickle, such as expert.catalan.bin; no code in it is run")
    parser.add_argument("output_dir", help="folder to create for the adapter")
    parser.add_argument("--language", help="code or English name; by default that of the file")
    parser.add_argument(
        "--base_model_name_or_path",
        metavar="ID",
        default="openai/whisper-small",
        help="base model that the adapter's config names",
    )
    return parser


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    arguments = parser.parse_args(argv)

    from ..checkpoints.convert_naver import convert_naver_expert
    from ..files import check_output_folder
    from ..sources import did_you_mean

    if not os.path.isfile(arguments.path):
        parser.exit(1, f"error: there is no file {arguments.path}{did_you_mean(arguments.path)}\n")
    try:
        check_output_folder(arguments.output_dir, "output_dir")
        print(f"wrote {convert_naver_expert(**vars(arguments))}")
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    return 0
