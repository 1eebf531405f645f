"""`peft-clsr compare`: the results of several training runs in one table."""

from __future__ import annotations

import argparse

from .run_folder import read_results
from .table import RESULTS_HEADER, markdown_table, results_rows

DESCRIPTION = "show the results of several training runs in one table"


def make_parser(prog: str, everything: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        description="Show the results of several training runs in one table, experts and LoRA alike. Equal rows, such "
        "as those of the base model, are shown once.",
    )
    parser.add_argument("runs", nargs="+", metavar="FOLDER", help="output_dir of a 'peft-clsr train'")
    parser.add_argument("--languages", nargs="+", metavar="CODE", help="codes or English names; all by default")
    return parser


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    arguments = parser.parse_args(argv)

    from ..languages import language_code

    try:
        results = {folder: read_results(folder) for folder in arguments.runs}
        wanted = None if arguments.languages is None else [language_code(name) for name in arguments.languages]
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    trained = sorted({language for run in results.values() for language in run["languages"]})
    rows, shown = [], set()
    for language in trained if wanted is None else wanted:
        for folder, run_results in results.items():
            if language not in run_results["languages"]:
                continue
            for row in results_rows(run_results, language):
                if row[2].startswith("with ") or tuple(row) not in shown:
                    rows.append([folder, *row])
                shown.add(tuple(row))
    if not rows:
        parser.exit(2, f"error: no results of {wanted or 'any language'} in {', '.join(results)}\n")
    print(markdown_table(["run", *RESULTS_HEADER], rows))
    return 0
