"""`peft-clsr compare`: the results of several runs in one table."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = "show the results of several runs of train in one table"


def make_parser(prog: str, everything: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="the --output_dir of a run of peft-clsr train"
    )
    return parser


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    folders = parser.parse_args(argv).runs
    from .run_folder import read_results
    from .table import comparison_table

    try:
        print(comparison_table({folder: read_results(folder) for folder in folders}))
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    return 0
