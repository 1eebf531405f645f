"""`peft-clsr compare`: the results of several training runs in one table."""

from __future__ import annotations

import argparse
import sys

from .run_folder import describe_unfinished, read_results
from .table import RESULTS_HEADER, markdown_table, results_rows

DESCRIPTION = "show the results of several training runs in one table"


def make_parser(prog: str, everything: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        description="Show the results of several training runs in one table, experts and LoRA alike. Equal rows of "
        "base model and teacher are shown once.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a 'peft-clsr train'")
    return parser


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    folders = parser.parse_args(argv).runs
    try:
        runs = {folder: read_results(folder) for folder in folders}
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    for folder, results in runs.items():
        if results["unfinished"]:
            print(describe_unfinished(results, folder), file=sys.stderr)
    if not any(results["languages"] for results in runs.values()):
        parser.exit(2, f"error: {', '.join(folders)}: no language is finished. Give the 'peft-clsr train' again\n")
    rows: list[list[str]] = []
    for language in sorted({language for results in runs.values() for language in results["languages"]}):
        for folder, results in runs.items():
            for row in results_rows(results, language) if language in results["languages"] else []:
                row = [*row, folder if row[2].startswith("with ") else ""]
                if row not in rows:
                    rows.append(row)
    print(markdown_table([*RESULTS_HEADER, "run"], rows))
    return 0
