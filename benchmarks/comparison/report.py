"""
Make the tables and figures of the comparison from the results of its runs.

    python -m benchmarks.comparison.report

reads the tables in `benchmarks/results`, and writes into `docs/results`: `tables.md`, the figures as PNG, and
`numbers.json` with every number of the figures. Missing runs are left out and named. The same results give the same
files.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .estimates import (
    DRAWS,
    by_parameters,
    differences_by_cell,
    mean_share,
    ranks,
    rate,
    rates_by_cell,
    untouched,
    variations,
)
from .figures import draw_all
from .methods import (
    GATE_SETTINGS,
    METHODS,
    SPLITS,
    STUDIED_LANGUAGE,
    TEACHER_SETTINGS,
    TUNING_LANGUAGES,
    TUNING_SEED,
    Candidate,
)
from .selection import (
    all_variations,
    by_cell,
    chosen,
    in_order,
    is_trained_on_one,
    label,
    language_and_seed,
    languages_of,
    main_grid,
    main_settings,
    method_of,
    of_students,
    tuning,
    tuning_runs,
    with_split,
)
from .store import TABLE, Result, load

NONE = "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, and an empty line."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def format_interval(cell: dict[str, float] | None, sign: str = "") -> str:
    if cell is None:
        return NONE
    return "{} [{}, {}]".format(*(f"{100 * cell[name]:{sign}.1f}" for name in ("value", "low", "high")))


def format_range(values: Sequence[float], digits: int = 0) -> str:
    """The mean, and the lowest and highest value if they differ."""
    lowest, mean, highest = (f"{value:,.{digits}f}" for value in (min(values), np.mean(values), max(values)))
    return mean if lowest == highest else f"{mean} ({lowest} to {highest})"


def format_settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {'none' if value is None else value}" for name, value in settings.items())


def format_tuning(pair: tuple[float | None, int | None]) -> str:
    learning_rate, rank = pair
    return f"{learning_rate:g}" + ("" if rank is None else f", rank {rank}")


# ------------------------------------------------------------------------------------------------- what is compared


def grid_section(results: Sequence[Result]) -> list[str]:
    """The runs of the main grid, the settings that they share, and missing runs."""
    grid = main_grid(results)
    cells = by_cell(grid)
    languages = languages_of(grid)
    seeds = sorted({run["settings"]["seed"] for run in grid if is_trained_on_one(run)})
    rows, common = [], {}
    for row in in_order(grid):
        runs = [run for (name, _), some in cells.items() if name == row for run in some]
        columns = [row, str(len({run["name"] for run in runs}))]
        if is_trained_on_one(runs[0]):
            here = {language_and_seed(run) for run in runs}
            absent = {lang: [f"{seed}" for seed in seeds if (lang, seed) not in here] for lang in languages}
            missing = [f"{lang} {' '.join(numbers)}" for lang, numbers in absent.items() if numbers]
            main = main_settings(results, *method_of(runs[0]))
            own = {name: value for name, value in main.items() if name in GATE_SETTINGS + TEACHER_SETTINGS}
            common |= {name: value for name, value in main.items() if name not in own}
            columns += [format_tuning(tuning(runs[0])), format_settings(own) or NONE]
        else:
            missing = [lang for lang in languages if lang not in languages_of(runs)]
            columns += [NONE, NONE]
        rows.append([*columns, ", ".join(missing) or "none"])
    header = ["method", "runs", "learning rate", "settings", "missing (language, seeds)"]
    shared = [f"All that are trained: {format_settings(common)}.", ""] if common else []
    return ["### Runs of the grid", "", *shared, *table(header, rows)]


# ----------------------------------------------------------------------------------------------------- error rates


def rate_sections(results: Sequence[Result]) -> list[str]:
    """WER, its spread over seeds, differences, CER and kinds of errors, in and out of domain."""
    lines = []
    for split, title in SPLITS.items():
        runs = with_split(main_grid(results), split)
        if not runs:
            continue
        lines += [
            f"### WER {title}, %",
            "",
            'Mean over seeds, with the 95 % interval over utterances. "mean": over languages, where all are there.',
            "",
            *interval_table(rates_by_cell(runs, split)),
            *spread_table(runs, split),
            *difference_tables(runs, split, "wer"),
            f"### CER {title}, %",
            "",
            *interval_table(rates_by_cell(runs, split, "cer")),
            *difference_tables(runs, split, "cer"),
            *kinds_table(runs, split),
        ]
    return lines


def interval_table(rows: dict[str, dict[str, dict[str, float]]], sign: str = "") -> list[str]:
    """Intervals by label and language."""
    columns = sorted(
        {column for cells in rows.values() for column in cells}, key=lambda column: (column == "mean", column)
    )
    lines = [[row, *(format_interval(cells.get(column), sign) for column in columns)] for row, cells in rows.items()]
    return table(["method", *columns], lines)


def spread_table(runs: Sequence[Result], split: str) -> list[str]:
    languages = languages_of(runs)
    rows = []
    for row, cells in rates_by_cell(runs, split).items():
        spreads = {language: cell["spread"] for language, cell in cells.items() if len(cell.get("seeds", ())) > 1}
        if spreads:
            line = [" to ".join(map(percent, spreads[lang])) if lang in spreads else NONE for lang in languages]
            rows.append([row, *line])
    if not rows:
        return []
    return [f"Lowest and highest seed, WER {SPLITS[split]}, %:", "", *table(["method", *languages], rows)]


def difference_tables(runs: Sequence[Result], split: str, name: str) -> list[str]:
    """Differences to LoRA, to full fine-tuning, and of each method with a teacher to the same method without."""
    lines, what_and_where = [], f"{name.upper()} {SPLITS[split]}"
    for reference in (METHODS["lora"], METHODS["full"]):
        rows = differences_by_cell(runs, reference, split, name)
        if rows:
            what = f"Difference to {reference} in {what_and_where}, points, on the same utterances (below 0: better):"
            lines += [what, "", *interval_table(rows, "+")]
    alone = {label(run): METHODS[method_of(run)[0]] for run in runs if method_of(run)[1]}
    taught = {
        row: cells
        for reference in dict.fromkeys(alone.values())
        for row, cells in differences_by_cell(runs, reference, split, name).items()
        if alone.get(row) == reference
    }
    if taught:
        what = f"Difference that the teacher makes to the same method in {what_and_where}, points:"
        lines += [what, "", *interval_table(taught, "+")]
    return lines


def kinds_table(runs: Sequence[Result], split: str) -> list[str]:
    kinds = ("substitutions", "deletions", "insertions")
    cells = by_cell(runs)
    rows = []
    for row in in_order(runs):
        languages = [language for language in languages_of(runs) if (row, language) in cells]
        means = [np.mean([rate(cells[row, language], split, kind)[0] for language in languages]) for kind in kinds]
        rows.append([row, " ".join(languages), *map(percent, means)])
    return [
        f"### Kinds of errors {SPLITS[split]}, % of words",
        "",
        "Means over seeds and the languages named.",
        "",
        *table(["method", "languages", *kinds], rows),
    ]


# ---------------------------------------------------------------------------------------------------------- others


def tuning_section(results: Sequence[Result]) -> list[str]:
    rows = []
    methods = {label(run): method_of(run) for run in results if is_trained_on_one(run)}
    for row in in_order([run for run in results if is_trained_on_one(run)]):
        rates: dict[Candidate, dict[str, str]] = {}
        for run in tuning_runs(results, *methods[row]):
            rate = percent(run["evaluations"]["validation"]["wer"])
            rates.setdefault(tuning(run), {})[run["settings"]["language"]] = rate
        choice = chosen(results, *methods[row])
        for candidate in sorted(rates, key=lambda candidate: (candidate[1] or 0, candidate[0])):
            mark = "**" * (len(rates) > 1 and candidate == choice)
            cells = [rates[candidate].get(language, NONE) for language in TUNING_LANGUAGES]
            rows.append([row, f"{mark}{format_tuning(candidate)}{mark}", *cells])
    if not rows:
        return []
    return [
        "### Tuning",
        "",
        f"WER on the validation splits, %, seed {TUNING_SEED}. In bold the lowest mean over both languages, which is "
        "what the main grid uses.",
        "",
        *table(["method", "learning rate", *TUNING_LANGUAGES], rows),
    ]


def variation_section(results: Sequence[Result]) -> list[str]:
    rows = []
    for entry in variations(results):
        languages = sorted({language for language, _ in entry["runs"]})
        cells = [entry["method"], format_settings(entry["changed"]), " ".join(languages), str(len(entry["runs"]))]
        for split in SPLITS:
            rates = entry.get(split, {})
            share = rates.get("share")
            cells += [
                format_interval(rates.get("wer")),
                format_interval(rates.get("to_main"), "+"),
                NONE if share is None else percent(share),
            ]
        rows.append(cells)
    if not rows:
        return []
    columns = [f"{name}, {title}" for title in SPLITS.values() for name in ("WER", "to main", "to expert")]
    return [
        "### Changed settings",
        "",
        "Runs that differ from the method's main runs in these settings alone: WER, %; its difference to the main "
        "runs of the same languages and seeds, points; share of tokens sent to the expert, %.",
        "",
        *table(["method", "changed", "languages", "runs", *columns], rows),
    ]


def rank_section(results: Sequence[Result]) -> list[str]:
    points: dict[tuple[str, int | None], dict[str, dict[str, Any]]] = {}
    for split, methods in by_parameters(results).items():
        for row, entries in methods.items():
            for entry in entries:
                points.setdefault((row, entry["rank"]), {})[split] = entry
    rows = []
    for (row, _), entries in points.items():
        one = next(iter(entries.values()))
        cells = [row, format_tuning((one["learning_rate"], one["rank"])), f"{one['trained_parameters']:,.0f}"]
        rates = [format_interval(entries[split]["wer"] if split in entries else None) for split in SPLITS]
        rows.append([*cells, str(len(one["seeds"])), *rates])
    if not rows:
        return []
    header = ["method", "learning rate", "trained parameters", "seeds", *(f"WER {title}" for title in SPLITS.values())]
    return [
        "### Trained parameters",
        "",
        f"WER, %, {STUDIED_LANGUAGE}; the rank of the main grid with the learning rate of that, others with that of "
        "their lowest WER on the validation split.",
        "",
        *table(header, rows),
    ]


def share_section(results: Sequence[Result]) -> list[str]:
    grid = [run for run in main_grid(results) if run.get("gates")]
    cells = by_cell(grid)
    columns = languages_of(grid)
    rows = []
    for row in in_order(grid):
        for split, title in SPLITS.items():
            shares = [mean_share(cells.get((row, language), []), split) for language in columns]
            if any(share is not None for share in shares):
                rows.append([row, title, *(NONE if share is None else percent(share) for share in shares)])
    if not rows:
        return []
    return ["### Tokens sent to the expert, %", "", *table(["method", "speech", *columns], rows)]


def untouched_section(results: Sequence[Result]) -> list[str]:
    entries = untouched(results)
    if not entries:
        return []
    columns = sorted({name for entry in entries for name in entry["rates"]})
    rows = []
    for entry in entries:
        cells = [entry["method"], entry["language"], str(entry["runs"])]
        for name in columns:
            value = entry["rates"].get(name)
            cells.append(f"{value:.1f}" if isinstance(value, float) else format_interval(value))
        rows.append(cells)
    return [
        "### What the training was not about",
        "",
        'At 30 s of context: WER of other languages, %, and translation into English, of 100. "own": the language '
        "that the run was trained on. The unchanged model's rows are what was there before. Other languages are "
        "routed past the experts; LoRA stays on.",
        "",
        *table(["method", "trained on", "runs", *columns], rows),
    ]


def gates_section(results: Sequence[Result]) -> list[str]:
    measured = [run for run in main_grid(results) if "without_gates" in run]
    if not measured:
        return []
    rows, order = [], in_order(measured)
    for run in sorted(measured, key=lambda run: (order.index(label(run)), language_and_seed(run))):
        logits = [gate for gate in run["gate_logits"].values() if gate["mean"] is not None]  # finite
        cells = [label(run), *map(str, language_and_seed(run))]
        for split in SPLITS:
            rates = [run["evaluations"][split], *(rates[split] for rates in run["without_gates"].values())]
            cells += [percent(rate["wer"]) for rate in rates]
        sizes = [np.median([abs(gate["mean"]) for gate in logits]), np.median([gate["std"] for gate in logits])]
        noise = run["settings"]["gate_noise"]
        rows.append([*cells, *(f"{size:.2f}" for size in sizes), f"{noise:g}"])
    names = ["its gates", *measured[0]["without_gates"]]
    header = ["method", "language", "seed", *(f"{title}: {name}" for title in SPLITS.values() for name in names)]
    return [
        "### What the gates are worth",
        "",
        "WER, %, of the same weights with their own gates, with all tokens sent to the expert, and with a half of "
        "them, drawn by chance. Gate logits: the distance of a gate's mean from 0 and its standard deviation over "
        "tokens, of the median gate each; and the standard deviation of the noise at its highest.",
        "",
        *table([*header, "logit mean", "over tokens", "noise"], rows),
    ]


def cost_section(results: Sequence[Result]) -> list[str]:
    grid = [run for run in main_grid(results) if "trained_parameters" in run]
    rows = []
    for row in in_order(grid):
        runs = {run["name"]: run for run in grid if label(run) == row}.values()
        columns = ("trained_parameters", "train_utterances", "train_steps", "train_seconds")
        rows.append([row, str(len(runs)), *(format_range([run[column] for run in runs]) for column in columns)])
    if not rows:
        return []
    header = ["method", "runs", "trained parameters", "utterances", "steps", "seconds of training"]
    return ["### Cost of training", "", "Means over runs (lowest to highest).", "", *table(header, rows)]


# ------------------------------------------------------------------------------------------------------- the report


def format_tables(results: Sequence[Result]) -> str:
    lines = [
        "# Tables of the comparison",
        "",
        "Made by `python -m benchmarks.comparison.report` from `benchmarks/results`; not to be edited.",
        "",
        f"Intervals are the 2.5 and 97.5 percentiles of {DRAWS:,} bootstrap samples of the utterances, the same",
        "samples for all methods and seeds; the spread over seeds is not in them.",
        "",
    ]
    machines = {run["name"]: format_settings(run["machine"]) for run in results}
    lines += [f"Runs: {len(machines)}, of which", ""]
    lines += [f"- {count} on {machine}" for machine, count in sorted(Counter(machines.values()).items())] + [""]
    for student, runs in of_students(results).items():
        lines += [f"## {student}", ""]
        for section in SECTIONS:
            lines += section(runs)
        unused = sorted({run["name"] for run in runs} - used_names(runs))
        if unused:
            lines += ["### In no table", "", *(f"- {name}" for name in unused), ""]
    return "\n".join(lines).rstrip() + "\n"


def used_names(results: Sequence[Result]) -> set[str]:
    used = [*main_grid(results), *(run for run, _ in all_variations(results))]
    for method in {method_of(run) for run in results}:
        used += tuning_runs(results, *method)
        used += [run for runs in ranks(results, *method).values() for run in runs]
    return {run["name"] for run in used}


SECTIONS = (
    grid_section,
    rate_sections,
    tuning_section,
    variation_section,
    rank_section,
    share_section,
    gates_section,
    untouched_section,
    cost_section,
)


def rounded(numbers: Any) -> Any:
    """Numbers with six decimals, as JSON has them: not finite ones become `None`."""
    if isinstance(numbers, dict):
        return {key: rounded(value) for key, value in numbers.items()}
    if isinstance(numbers, list):
        return [rounded(value) for value in numbers]
    if isinstance(numbers, float):
        return round(numbers, 6) if math.isfinite(numbers) else None
    return numbers


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--results_dir", type=Path, default=Path("benchmarks/results"), help="tables of runs")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="folder for tables and figures")
    options = parser.parse_args(arguments)

    results = load(options.results_dir)
    if not results:
        parser.error(
            f"no {options.results_dir}/*/{TABLE}: run python -m benchmarks.comparison.compare first, or name its "
            "folder"
        )
    options.output_dir.mkdir(parents=True, exist_ok=True)
    numbers_file = options.output_dir / "numbers.json"
    if numbers_file.exists():  # remove the figures of an earlier report: their runs may be gone
        for name in json.loads(numbers_file.read_text(encoding="utf-8")):
            (options.output_dir / name).unlink(missing_ok=True)
    (options.output_dir / "tables.md").write_text(format_tables(results), encoding="utf-8")
    (_, runs), *others = of_students(results).items()
    numbers = draw_all(runs, options.output_dir, dict(others))
    numbers_file.write_text(json.dumps(rounded(numbers), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"{len({run['name'] for run in results})} runs: {options.output_dir}/tables.md, {len(numbers)} figures")


if __name__ == "__main__":
    main()
