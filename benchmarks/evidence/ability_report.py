"""The tables of what trainings did to other abilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.comparison.errors import RATES
from benchmarks.comparison.estimates import interval
from benchmarks.comparison.report import NONE, format_interval, table

from .ability_table import Abilities, chrf, on_time
from .estimates import Counts, shared, totals
from .grid import UNCHANGED
from .rows import Row, common_languages, mean


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


def _wer(sums: np.ndarray) -> np.ndarray:
    errors, words = RATES["wer"]
    return sums[:, errors].sum(axis=-1) / sums[:, words]


# For each score: the counts of an entry (`None` if it has none), which draws it shares, and the score of sums.
SCORES: dict[str, tuple[Callable[[Abilities], Any], str, Callable[[np.ndarray], np.ndarray]]] = {
    "other_wer": (lambda entry: entry["other"]["utterances"], "other", _wer),
    "translation": (lambda entry: entry["translation"], "translation", chrf),
    "shared_decoder": (lambda entry: entry.get("shared_decoder"), "translation", chrf),
    "on_time": (lambda entry: on_time(entry["times"]), "times", _ratio),
}
TITLES = {
    "other_wer": "another language, WER, %",
    "translation": "translation, chrF",
    "shared_decoder": "with the shared decoder",
    "on_time": "timestamps within 0.5 s, %",
}


def _counts(row: Row, language: str, name: str) -> Counts:
    counts = {fold: SCORES[name][0](entry) for fold, entry in row.abilities.get(language, {}).items()}
    return {fold: np.asarray(count, dtype=np.int64) for fold, count in counts.items() if count is not None}


def _draws(counts: Counts, language: str, name: str) -> np.ndarray | None:
    _, split, score = SCORES[name]
    return score(totals(counts, language, split)) if counts else None


def _difference(row: Row, unchanged: Row, language: str, name: str) -> np.ndarray | None:
    """To the unchanged model; a decoder that is shared translates as that of `unchanged` does."""
    reference = "translation" if name == "shared_decoder" else name
    ours, theirs = shared(_counts(row, language, name), _counts(unchanged, language, reference))
    if not ours:
        return None
    return _draws(ours, language, name) - _draws(theirs, language, reference)


def ability_numbers(rows: Sequence[Row]) -> dict[str, Any]:
    """By label and language or "mean": intervals of each score, and of its difference to the unchanged model."""
    rows = [row for row in rows if row.abilities]
    languages = common_languages({row.label: list(row.abilities) for row in rows})
    unchanged = next((row for row in rows if row.label == UNCHANGED.label), None)
    numbers: dict[str, Any] = {}
    for row in rows:
        cells: dict[str, Any] = {}
        for name in SCORES:
            draws = {language: _draws(_counts(row, language, name), language, name) for language in row.abilities}
            draws["mean"] = mean([draws.get(language) for language in languages])
            for language, values in draws.items():
                if values is not None:
                    cells.setdefault(language, {})[name] = interval(values)
            if unchanged is not None and row is not unchanged:
                differences = mean([_difference(row, unchanged, language, name) for language in languages])
                if differences is not None:
                    cells["mean"][f"{name} to unchanged"] = interval(differences)
        for language, entries in row.abilities.items():
            errors = [np.inf if e is None else e for entry in entries.values() for e in entry["times"]]
            median = float(np.median(errors))
            cells[language]["median_time_error"] = median if np.isfinite(median) else None
            cells[language]["folds"] = sorted(entries)
            cells[language]["identical"] = [entry["other"]["identical"] for entry in entries.values()]
        numbers[row.label] = cells
    return numbers


def abilities_section(numbers: dict[str, Any]) -> list[str]:
    """Empty if nothing was measured."""
    if not numbers:
        return []
    rows, differences = [], []
    for label, cells in numbers.items():
        for language, cell in cells.items():
            identical = [each for each in cell.get("identical", []) if each is not None]
            median = cell.get("median_time_error")
            rows.append(
                [
                    label,
                    language,
                    str(len(cell["folds"])) if "folds" in cell else NONE,
                    *(format_interval(cell.get(name)) for name in SCORES),
                    f"{median:.2f} s" if median is not None else NONE,
                    f"{sum(identical)} of {len(identical)}" if identical else NONE,
                ]
            )
        mean_cell = cells.get("mean", {})
        if any(name.endswith("to unchanged") for name in mean_cell):
            differences.append(
                [label, *(format_interval(mean_cell.get(f"{name} to unchanged"), "+") for name in SCORES)]
            )
    text = (
        "Made by `python -m benchmarks.evidence.abilities`, on the test of each fold. The other language is Catalan; "
        "LoRA is left on in it. Experts are not used there: 'bit-identical' counts trainings whose logits and tokens "
        "are those of the unchanged model. Translation is of the trained language into English. 'With the shared "
        "decoder' is `translate_with_shared_decoder`. Timestamps are those of recordings joined to a minute; WER on "
        "these, long form, stands above. Intervals as above."
    )
    header = ["method", "language", "trainings", *TITLES.values(), "median error in time", "bit-identical"]
    lines = ["## Untouched ability", "", text, "", *table(header, rows)]
    if differences:
        lines += ["Differences to the unchanged model, mean over languages, in points:", ""]
        lines += table(["method", *TITLES.values()], differences)
    return lines
