"""
Make the page of the second round from the results of its runs: tables and a figure.

    python -m benchmarks.evidence.report

reads `benchmarks/results/evidence`, and writes `second-round.md`, `second-round.png` and `second-round.json` (every
number of both) into `docs/results`. A grid that is not complete is reported, too: the page says which trainings a
number rests on, and calls nothing better or worse before each language has three. The same results give the same
files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparison.estimates import DRAWS, interval
from benchmarks.comparison.folds import FOLDS, HUMAN, LANGUAGES
from benchmarks.comparison.report import NONE, format_interval, format_range, format_tuning, percent, table
from benchmarks.comparison.store import ResultStore

from .ability_report import abilities_section, ability_numbers
from .estimates import difference
from .few_report import few_numbers, few_section, known_section
from .figure import draw
from .grid import METHODS, TAUGHT_EXPERTS, UNCHANGED, Grid
from .pair_report import PAIRS, pair_numbers, pair_section
from .rows import BOTH, SPLITS, TEACHER, Row, common_languages, language_name, mean, read_rows
from .tuning_report import tuning_section

REFERENCES = ("LoRA", "full fine-tuning")
NAMES = {"wer": "WER", "cer": "CER", "bounded": "bounded WER"}  # see `estimates.RATES`
NAME = "second-round"


def to_interval(draws: np.ndarray | None) -> dict[str, float] | None:
    return None if draws is None else interval(draws)


def rates(rows: Sequence[Row], languages: Sequence[str], in_mean: Sequence[str]) -> dict[str, Any]:
    """
    By split, label and language or "mean": intervals of "wer" and "cer", and the folds that were measured.

    Args:
        rows (`Sequence[Row]`): The rows.
        languages (`Sequence[str]`): Columns.
        in_mean (`Sequence[str]`): The languages that the mean is over.
    """
    numbers: dict[str, Any] = {}
    for split in SPLITS:
        for row in rows:
            cells: dict[str, Any] = {}
            for name in ("wer", "cer"):
                draws = {language: row.rate(language, split, name) for language in languages}
                draws["mean"] = mean([draws[language] for language in in_mean])
                for language, values in draws.items():
                    if values is not None:
                        cells.setdefault(language, {})[name] = interval(values)
            for language in cells.keys() - {"mean"}:
                cells[language]["folds"] = sorted(row.results[language])
            numbers.setdefault(split, {})[row.label] = cells
    return numbers


def both_domains(rows: Sequence[Row], languages: Sequence[str], expected: Sequence[str]) -> dict[str, Any]:
    """
    By label: mean over languages and both domains of each of `NAMES`, and differences to `REFERENCES`.

    Args:
        rows (`Sequence[Row]`): The rows.
        languages (`Sequence[str]`): The languages that means are over.
        expected (`Sequence[str]`): Those of the grid. Verdicts wait until each has all folds.
    """
    by_label = {row.label: row for row in rows}

    def mean_of(cell: Callable[[str, str], np.ndarray | None]) -> dict[str, float] | None:
        return to_interval(mean([cell(language, split) for split in BOTH for language in languages]))

    numbers: dict[str, Any] = {}
    for row in rows:
        entry: dict[str, Any] = {"trainings": sum(len(row.folds(language)) for language in languages)}
        for name in NAMES:
            entry[name] = mean_of(lambda language, split, row=row, name=name: row.rate(language, split, name))
        for reference in REFERENCES:
            other = by_label.get(reference)
            if other is None or other is row:
                continue
            folds = [row.folds(language) & other.folds(language) for language in expected]
            for name in NAMES:
                entry[f"{name} to {reference}"] = mean_of(
                    lambda language, split, row=row, name=name, other=other: difference(
                        row.counts(language, split), other.counts(language, split), language, split, name
                    )
                )
                found = verdict(entry[f"{name} to {reference}"], list(map(len, folds)))
                entry[f"verdict of {name} to {reference}"] = found
        numbers[row.label] = entry
    return numbers


def verdict(cell: dict[str, float] | None, trainings: Sequence[int]) -> str:
    """
    A difference in a word.

    Args:
        cell (`dict`, *optional*): Its interval; below 0 is better.
        trainings (`Sequence[int]`): That both rows have, of each language.
    """
    if cell is None or min(trainings) < FOLDS:
        return f"too early: {sum(trainings)} of {FOLDS * len(trainings)} trainings"
    if cell["low"] <= 0 <= cell["high"]:
        return "level"
    return "better" if cell["value"] < 0 else "worse"


# -------------------------------------------------------------------------------------------------------------- tables


def short_section(both: dict[str, Any], human: dict[str, Any], expected: int) -> list[str]:
    """Sentences that compare the experts with the aim: in the mean of the languages, and where the voice is human."""
    lines = []
    for where, numbers in (("", both), (f"{language_name(HUMAN)}, ", human)):
        for label, entry in numbers.items():
            if label not in ("experts", TAUGHT_EXPERTS.label):
                continue
            for reference in REFERENCES:
                cell = entry.get(f"wer to {reference}")
                if cell is not None:
                    compared = f"{where}{label}, to {reference}: {entry[f'verdict of wer to {reference}']}"
                    bounded = format_interval(entry[f"bounded to {reference}"], "+")
                    word = entry[f"verdict of bounded to {reference}"]
                    lines.append(
                        f"- **{compared}**, {format_interval(cell, '+')} points of WER. Bounded: {word}, {bounded}."
                    )
    if not lines:
        return ["## In short", "", "No experts are there yet to be compared.", ""]
    text = (
        f"Mean over languages and over both domains. A row has {expected} trainings when it is complete. 'Level': the "
        "interval of the difference has 0 in it. Below 0, the method named first has fewer errors. 'Bounded': an "
        "utterance counts as wholly wrong at most, however often a model repeats itself in it."
    )
    return ["## In short", "", text, "", *lines, ""]


def cell_text(cell: dict[str, Any] | None) -> str:
    """WER, CER, and the trainings if some are missing."""
    if cell is None:
        return NONE
    folds = len(cell.get("folds", range(FOLDS)))
    text = f"{percent(cell['wer']['value'])} ({percent(cell['cer']['value'])})"
    return text if folds == FOLDS else f"{text}, {folds} of {FOLDS}"


def rates_section(numbers: dict[str, Any], languages: Sequence[str]) -> list[str]:
    lines = []
    for split, title in SPLITS.items():
        rows = []
        for label, cells in numbers[split].items():
            columns = [cell_text(cells.get(name)) for name in (*languages, "mean")]
            rows.append([label, *columns, format_interval(cells.get("mean", {}).get("wer"))])
        header = ["WER (CER), %", *languages, "mean", "mean WER and its interval"]
        lines += [f"## {title.capitalize()}", "", *table(header, rows)]
    return lines


def both_section(
    numbers: dict[str, Any], expected: int, title: str, text: str, names: Sequence[str] = ("wer", "cer")
) -> list[str]:
    """Means of `both_domains`. Differences are of the first of the names."""
    name, rows = names[0], []
    for label, entry in numbers.items():
        cells = [format_interval(entry[each]) for each in names]
        for reference in REFERENCES:
            cells.append(format_interval(entry.get(f"{name} to {reference}"), "+"))
            cells.append(entry.get(f"verdict of {name} to {reference}", NONE))
        trainings = NONE if label == TEACHER else f"{entry['trainings']} of {expected}"  # a teacher counts in many
        rows.append([label, trainings, *cells])
    header = ["%, and differences in points", "trainings", *(NAMES[each] for each in names)]
    for reference in REFERENCES:
        header += [f"{NAMES[name]} to {reference}", ""]
    return [f"## {title}", "", text, "", *table(header, rows)]


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
    lines = ["## Runs", ""]
    if rows:
        lines += table([*header, "another language bit-identical"], cells)
        lines += float32_line(rows)
    return lines + [f"Not run: {'; '.join(missing)}.", ""] * bool(missing)


def float32_line(rows: Sequence[Row]) -> list[str]:
    """A line that names the runs in float32, if others are in bfloat16."""
    names: dict[bool, list[str]] = {True: [], False: []}
    for row in rows:
        for language, folds in row.results.items():
            for fold, run in folds.items():
                names[run["settings"]["precision"] == "float32"].append(f"{row.label} {language} {fold}")
    if not all(names.values()):
        return []
    text = f"In float32, as their CPU had no bfloat16 instructions: {', '.join(names[True])}."
    return [f"{text} All others of this table: in bfloat16.", ""]


def figure_points(both: dict[str, Any], rows: Sequence[Row], expected: int) -> list[dict[str, Any]]:
    """The points of the figure: rows with a mean, which says how many trainings it has if some are missing."""
    points = []
    for row in rows:
        entry = both[row.label]
        if entry["wer"] is None or row.label == UNCHANGED.label:
            continue
        some = f" ({entry['trainings']} of {expected} trainings)" if entry["trainings"] < expected else ""
        values = {name: 100 * entry["wer"][name] for name in ("value", "low", "high")}
        points.append({"label": row.label + some, "has_experts": row.has_experts, **values})
    return points


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
    tuning = tuning_section(grid)
    if not rows and not tuning:
        raise ValueError(f"{store.table_dir} has no results of methods: python -m benchmarks.evidence.run makes them")
    languages = [language for language in LANGUAGES if any(language in row.results for row in rows)]
    in_mean = common_languages({row.label: list(row.results) for row in rows})
    expected = FOLDS * len(set(grid.languages) | set(in_mean))
    numbers = rates(rows, languages, in_mean)
    everywhere = [row for row in rows if set(in_mean) <= row.results.keys()]
    both = both_domains(everywhere, in_mean, [*dict.fromkeys((*grid.languages, *in_mean))])
    human = both_domains(rows, [HUMAN], [HUMAN]) if HUMAN in languages else {}
    abilities = ability_numbers(rows)
    paired = {name: pair_numbers(pairs, rows) for name, pairs in PAIRS.items()}
    few = few_numbers(grid)
    points = figure_points(both, everywhere, expected)

    lines = ["# Second round: experts, LoRA and full fine-tuning", ""]
    if missing:
        there = sum(len(row.every()) for row in rows if row.label != TEACHER)
        total = sum(FOLDS * len(grid.languages_of(method)) for method in METHODS)
        named = "The others are named at the end of [Runs](#runs)."
        lines += [f"**Not complete: {there} of {total} runs are there.** {named}", ""]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    picture = options.output_dir / f"{NAME}.png"
    names = ", ".join(map(language_name, in_mean))
    if points:
        unchanged = both.get(UNCHANGED.label, {}).get("wer")
        title = f"Word errors in {names}, %: mean of both domains"
        draw(points, unchanged and 100 * unchanged["value"], title, picture)
        lines += [f"![Word errors by method, mean of both domains]({NAME}.png)", ""]
    else:
        picture.unlink(missing_ok=True)
    lines += short_section(both, human, expected)
    lines += [
        "How it was done stands in [results](index.md#second-round). This page is made by "
        f"`python -m benchmarks.evidence.report`. Intervals are of 95 %, from {DRAWS:,} draws of a hierarchical "
        "bootstrap: folds, which are trainings, and utterances within them. Three trainings are few: an interval of "
        "one language is rather too narrow, and one from a single training covers utterances alone. Means are over "
        f"{names or 'no language yet'}. Out of domain is a human voice in Russian, and a synthetic one elsewhere. "
        "'Taught' experts have a teacher beside the transcripts (KD).",
        "",
    ]
    if rows:
        text = (
            "Mean over languages, and over single recordings and those out of domain. Differences are over the folds "
            "that both rows have; below 0, the row is better. A model that repeats itself has a WER over 100 %: where "
            "the voice is synthetic, this decides the mean."
        )
        lines += both_section(both, expected, "Mean of both domains", text)
        text = (
            "The same, with no more errors in an utterance than it has words. Greedy decoding lets a model repeat "
            "itself to the limit of 160 tokens, and one such utterance can decide the WER of a fold. This table was "
            "added when most of the first two folds had been seen."
        )
        lines += both_section(both, expected, "Mean of both domains, repetitions bounded", text, ("bounded",))
        if human:
            text = (
                "The same in the language that has a human voice out of domain. Halves are compared with all of LoRA "
                "and of full fine-tuning here; with their halves further below."
            )
            lines += both_section(human, FOLDS, f"{language_name(HUMAN)}: mean of both domains", text)
        lines += rates_section(numbers, languages)
        for name, pairs in PAIRS.items():
            lines += pair_section(pairs, paired[name])
            if name == "taught":
                lines += known_section(grid) + few_section(grid, few)
        lines += abilities_section(abilities)
    lines += [*runs_section(rows, missing), *tuning]
    (options.output_dir / f"{NAME}.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    text = json.dumps(
        {"rates": numbers, "both domains": both, HUMAN: human, "abilities": abilities, "few": few} | paired,
        indent=1,
        sort_keys=True,
    )
    (options.output_dir / f"{NAME}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
