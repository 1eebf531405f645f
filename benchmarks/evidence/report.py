"""
Make the tables and the figure of the second round from the results of its runs.

    python -m benchmarks.evidence.report

reads `benchmarks/results/evidence`, and writes `second-round.md`, `second-round.png` and `second-round.json` (every
number of the figure) into `docs/results`. Missing runs are left out and named. The same results give the same files.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.comparison.estimates import DRAWS, interval
from benchmarks.comparison.folds import FOLDS, LANGUAGES
from benchmarks.comparison.methods import EXPERTS
from benchmarks.comparison.report import NONE, format_interval, format_range, format_tuning, percent, table
from benchmarks.comparison.runs import teacher_run
from benchmarks.comparison.speech import OUT_OF_DOMAIN
from benchmarks.comparison.store import Result, ResultStore

from .estimates import Counts, counts_of, difference, rate
from .grid import CANDIDATES, METHODS, TUNING_FOLD, TUNING_LANGUAGES, UNCHANGED, Grid

SPLITS = {"test": "single recordings", "joined": "joined recordings", OUT_OF_DOMAIN: "out of domain"}
BOTH = ("test", OUT_OF_DOMAIN)  # domains of the mean of both
REFERENCES = ("LoRA", "full fine-tuning")
TEACHER = "teacher, one for all languages"
NAME = "second-round"


@dataclass
class Row:
    """A row of the tables: a method's runs by language and fold, and by split the counts of their utterances."""

    label: str
    results: dict[str, dict[int, Result]] = field(default_factory=dict)
    prefix: str = ""  # of the teacher's evaluations: "{language} "

    def counts(self, language: str, split: str) -> Counts:
        key = self.prefix.format(language=language) + split
        return {fold: counts_of(run["evaluations"][key]) for fold, run in self.results.get(language, {}).items()}

    def rate(self, language: str, split: str, name: str) -> np.ndarray | None:
        counts = self.counts(language, split)
        return rate(counts, language, split, name) if counts else None

    def every(self) -> list[Result]:
        return [run for folds in self.results.values() for run in folds.values()]


def read_rows(grid: Grid) -> tuple[list[Row], list[str]]:
    """The rows with results, and what is missing."""
    rows, missing = [], []
    for method in METHODS:
        try:
            tuned = grid.tuned(method)
        except ValueError:
            missing.append(f"{method.label}: tuning")
            continue
        row, absent = Row(method.label), []
        for language in LANGUAGES:
            for fold in range(FOLDS):
                result = grid.store.read(grid.run(method, language, fold, tuned))
                if result is not None:
                    row.results.setdefault(language, {})[fold] = result
                elif language in grid.languages:
                    absent.append(f"{language} {fold}")
        if absent:
            missing.append(f"{method.label}: {', '.join(absent)}")
        if row.results:
            rows.append(row)
    teacher = Row(TEACHER, prefix="{language} ")
    for fold in range(FOLDS):
        result = grid.store.read(teacher_run(grid.max_steps, fold))
        if result is not None:
            for language in grid.languages:
                teacher.results.setdefault(language, {})[fold] = result
    return rows + [teacher] * bool(teacher.results), missing


def mean(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The mean of draws, `None` if one is missing."""
    return None if not parts or any(part is None for part in parts) else np.mean(parts, axis=0)


def to_interval(draws: np.ndarray | None) -> dict[str, float] | None:
    return None if draws is None else interval(draws)


def rates(rows: Sequence[Row], languages: Sequence[str]) -> dict[str, Any]:
    """By split, label and language or "mean": intervals of "wer" and "cer", and the folds that were measured."""
    numbers: dict[str, Any] = {}
    for split in SPLITS:
        for row in rows:
            cells: dict[str, Any] = {}
            for name in ("wer", "cer"):
                draws = {language: row.rate(language, split, name) for language in languages}
                for language, values in [*draws.items(), ("mean", mean(list(draws.values())))]:
                    if values is not None:
                        cells.setdefault(language, {})[name] = interval(values)
            for language in cells.keys() - {"mean"}:
                cells[language]["folds"] = sorted(row.results[language])
            numbers.setdefault(split, {})[row.label] = cells
    return numbers


def both_domains(rows: Sequence[Row], languages: Sequence[str]) -> dict[str, Any]:
    """By label: mean over languages and both domains, "wer" and "cer", and differences to `REFERENCES`."""
    by_label = {row.label: row for row in rows}

    def mean_of(cell: Callable[[str, str], np.ndarray | None]) -> dict[str, float] | None:
        return to_interval(mean([cell(language, split) for split in BOTH for language in languages]))

    numbers: dict[str, Any] = {}
    for row in rows:
        entry: dict[str, Any] = {}
        for name in ("wer", "cer"):
            entry[name] = mean_of(lambda language, split, row=row, name=name: row.rate(language, split, name))
            for reference in REFERENCES:
                if reference in by_label and reference != row.label:
                    other = by_label[reference]
                    entry[f"{name} to {reference}"] = mean_of(
                        lambda language, split, row=row, name=name, other=other: difference(
                            row.counts(language, split), other.counts(language, split), language, split, name
                        )
                    )
        numbers[row.label] = entry
    return numbers


# -------------------------------------------------------------------------------------------------------------- tables


def rates_section(numbers: dict[str, Any], languages: Sequence[str]) -> list[str]:
    lines = []
    for split, title in SPLITS.items():
        rows = []
        for label, cells in numbers[split].items():
            columns = [
                f"{percent(cells[name]['wer']['value'])} ({percent(cells[name]['cer']['value'])})"
                if name in cells
                else NONE
                for name in (*languages, "mean")
            ]
            rows.append([label, *columns, format_interval(cells.get("mean", {}).get("wer"))])
        header = ["WER (CER), %", *languages, "mean", "mean WER and its interval"]
        lines += [f"## {title.capitalize()}", "", *table(header, rows)]
    return lines


def both_section(numbers: dict[str, Any]) -> list[str]:
    names = ["wer", *(f"wer to {reference}" for reference in REFERENCES)]
    names += ["cer", *(f"cer to {reference}" for reference in REFERENCES)]
    rows = [
        [label, *(format_interval(entry.get(name), "+" if " to " in name else "") for name in names)]
        for label, entry in numbers.items()
    ]
    header = ["%, and differences in points", *(name[:3].upper() + name[3:] for name in names)]
    text = (
        "Mean over languages, and over single recordings and those out of domain. Differences are over the folds that "
        "both rows have; below 0, the row is better."
    )
    return ["## Mean of both domains", "", text, "", *table(header, rows)]


def runs_section(rows: Sequence[Row], missing: Sequence[str]) -> list[str]:
    cells = []
    for row in rows:
        runs = row.every()
        settings = runs[0]["settings"]
        trained = [run for run in runs if "train_seconds" in run]
        others = [run["others_untouched"] for run in runs if "others_untouched" in run]
        cells.append(
            [
                row.label,
                ", ".join(f"{language} {len(folds)}" for language, folds in row.results.items()),
                format_tuning((settings["learning_rate"], settings["rank"])) if trained else NONE,
                f"{runs[0]['trained_parameters'] / 1e6:.1f} M" if trained else NONE,
                format_range([run["train_seconds"] / 60 for run in trained], 1) if trained else NONE,
                f"{sum(others)} of {len(others)}" if others else NONE,
            ]
        )
    header = ["method", "folds", "learning rate, rank", "trained", "minutes of training"]
    lines = ["## Runs", "", *table([*header, "another language bit-identical"], cells)]
    return lines + [f"Not run: {'; '.join(missing)}.", ""] * bool(missing)


def tuning_section(grid: Grid) -> list[str]:
    rows = []
    for name in CANDIDATES:
        for candidate in CANDIDATES[name]:
            found = [
                grid.store.read(run) for run in grid.candidates(name) if (run.learning_rate, run.rank) == candidate
            ]
            rates = [result["evaluations"]["validation"]["wer"] if result else math.nan for result in found]
            if not all(map(math.isnan, rates)):
                columns = [NONE if math.isnan(rate) else percent(rate) for rate in rates]
                try:
                    mark = "chosen" if grid.chosen(name) == candidate else ""
                except ValueError:
                    mark = ""
                label = next(method.label for method in METHODS if method.name == name)
                rows.append([label, format_tuning(candidate), *columns, mark])
    text = (
        f"WER in validation, %, fold {TUNING_FOLD}. The lowest mean of both languages is chosen; of equal ones the "
        "first. Test recordings have no part in it. Taught rows have the settings of the untaught."
    )
    return ["## Tuning", "", text, "", *table(["method", "learning rate, rank", *TUNING_LANGUAGES, ""], rows)]


# -------------------------------------------------------------------------------------------------------------- figure


def draw(numbers: dict[str, Any], rows: Sequence[Row], path: Path) -> None:
    """The mean WER of each trained row: single and joined recordings on the left, out of domain on the right."""
    shown = [row for row in rows if row.label != UNCHANGED.label and "mean" in numbers["test"][row.label]][::-1]
    figure = Figure(figsize=(10, 1.6 + 0.4 * len(shown)), layout="constrained")
    figure.suptitle("Language experts (orange) and other trainings (gray): WER, mean over languages, 95 % intervals")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, splits, title in (
        (left, ("test", "joined"), "Readers and subject as in training"),
        (right, (OUT_OF_DOMAIN,), "Another voice, another subject"),
    ):
        for split in splits:
            joined = split == "joined"
            for place, row in enumerate(shown):
                cell = numbers[split][row.label].get("mean")
                if cell is None:
                    continue
                value, low, high = (100 * cell["wer"][name] for name in ("value", "low", "high"))
                color = "tab:orange" if row.every()[0]["settings"]["method"] in EXPERTS else "tab:gray"
                height = place - 0.25 * joined
                axes.plot([low, high], [height, height], color=color, linewidth=1.5, alpha=0.6)
                axes.plot(
                    value,
                    height,
                    marker="D" if joined else "o",
                    markerfacecolor="white" if joined else color,
                    color=color,
                    linestyle="none",
                    label=SPLITS[split] if place == 0 else None,
                )
        unchanged = numbers[splits[0]].get(UNCHANGED.label, {}).get("mean")
        axes.set_title(title + (f"\n{UNCHANGED.label}: {percent(unchanged['wer']['value'])} %" if unchanged else ""))
        axes.set_xlabel("WER, %: left is better")
        axes.grid(axis="x", alpha=0.3)
    left.set_yticks(range(len(shown)), [row.label for row in shown])
    if shown:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--results_dir", type=Path, default=Path("benchmarks/results/evidence"), help="folder of the tables")
    add("--output_dir", type=Path, default=Path("docs/results"), help="folder to write into")
    add("--student", default="whisper-base", help="name of the student's folder")
    add("--max_steps", type=int, default=-1, help="of the runs, if they were a trial")
    options = parser.parse_args(arguments)
    store = ResultStore(options.results_dir, options.results_dir, options.student)
    grid = Grid(store, max_steps=options.max_steps)
    rows, missing = read_rows(grid)
    if not rows:
        raise ValueError(f"{store.table_dir} has no results of methods: python -m benchmarks.evidence.run makes them")
    languages = [language for language in LANGUAGES if any(language in row.results for row in rows)]
    numbers = rates(rows, languages)
    both = both_domains(rows, languages)
    intro = (
        f"Made by `python -m benchmarks.evidence.report`. Intervals are of 95 %, from {DRAWS:,} draws of a "
        "hierarchical bootstrap: folds, which are trainings, and utterances within them. Three trainings are few: an "
        "interval of one language is rather too narrow. The mean over languages rests on three trainings of each. "
        "Out of domain is a human voice in Russian, and a synthetic one elsewhere."
    )
    lines = ["# Second round: tables", "", intro, "", *rates_section(numbers, languages), *both_section(both)]
    lines += [*runs_section(rows, missing), *tuning_section(grid)]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / f"{NAME}.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    text = json.dumps({"rates": numbers, "both domains": both}, indent=1, sort_keys=True)
    (options.output_dir / f"{NAME}.json").write_text(text + "\n", encoding="utf-8")
    draw(numbers, rows, options.output_dir / f"{NAME}.png")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
