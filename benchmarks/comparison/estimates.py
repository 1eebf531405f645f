"""Numbers of the comparison: error rates with bootstrap intervals over utterances, and shares of tokens."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import CHARACTERS, RATES, WORDS
from .methods import METHODS, SPLITS, STUDIED_LANGUAGE, TUNING_SEED
from .selection import (
    all_variations,
    by_cell,
    chosen,
    evaluation,
    in_order,
    label,
    language_and_seed,
    languages_of,
    main_grid,
    method_of,
    runs_of,
    settings_that_matter,
    tuning,
    with_split,
)
from .store import Result

DRAWS = 2_000


@functools.lru_cache(maxsize=32)
def resamples(language: str, split: str, utterances: int) -> np.ndarray:
    """
    Draw bootstrap samples of utterances: the same for all methods, so that their differences are paired, and
    independent between languages.

    Returns:
        `np.ndarray`: how often each utterance is in each sample, integers [1 + draws, utterances]. The first row is
        the data itself, all ones.
    """
    generator = np.random.default_rng([utterances, *f"{language} {split}".encode()])
    draws = generator.multinomial(utterances, np.full(utterances, 1 / utterances), size=DRAWS)
    return np.concatenate([np.ones((1, utterances), dtype=draws.dtype), draws])


def rate(runs: Sequence[Result], split: str, name: str = "wer") -> np.ndarray:
    """
    The error rate of a language's runs, mean over seeds, in the data and in each bootstrap sample.

    Errors and words are pooled over utterances. All seeds share the samples.

    Args:
        runs (`Sequence[dict]`): Runs of one method and language, one for each seed.
        split (`str`): "validation", "test", "out_of_domain", or a key of "untouched".
        name (`str`, defaults to "wer"): One of `RATES`.

    Returns:
        `np.ndarray`: fractions [1 + draws], that of the data first.

    Raises:
        ValueError: the runs were evaluated on different utterances.
    """
    first, *others = runs
    for other in others:
        check_same_utterances(first, other, split)
    counts = np.sum([evaluation(run, split)["utterances"] for run in runs], axis=0)  # [utterances, 6]
    totals = resamples(first["settings"]["language"], split, len(counts)) @ counts
    errors, units = RATES[name]
    return totals[:, errors].sum(axis=-1) / totals[:, units]


def check_same_utterances(one: Result, other: Result, split: str) -> None:
    """
    Raises:
        ValueError: the utterances of the runs differ in number or in length.
    """
    ours, theirs = (np.asarray(evaluation(run, split)["utterances"])[:, [WORDS, CHARACTERS]] for run in (one, other))
    if not np.array_equal(ours, theirs):
        raise ValueError(
            f"{one['name']} and {other['name']} were not evaluated on the same utterances of {split!r} "
            f"({len(ours)} and {len(theirs)} of them): run one of them again"
        )


def difference(runs: Sequence[Result], reference: Sequence[Result], split: str, name: str = "wer") -> np.ndarray:
    """`rate` of `runs` minus that of `reference` on the same utterances: below 0 if `runs` are better."""
    check_same_utterances(runs[0], reference[0], split)
    return rate(runs, split, name) - rate(reference, split, name)


def interval(values: np.ndarray) -> dict[str, float]:
    """The value of the data, and the 95 % percentile interval of the bootstrap samples."""
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def gate_shares(runs: Sequence[Result], split: str) -> dict[str, dict[int, float]]:
    """Share of tokens sent to the expert, mean over runs, by "encoder" or "decoder" and layer."""
    shares: dict[str, dict[int, list[float]]] = {"encoder": {}, "decoder": {}}
    for run in runs:
        for module, share in run.get("gates", {}).get(split, {}).items():
            side = "decoder" if "decoder" in module else "encoder"
            layer = int(re.search(r"\blayers\.(\d+)", module)[1])
            shares[side].setdefault(layer, []).append(share)
    return {
        side: {layer: float(np.mean(values)) for layer, values in sorted(layers.items())}
        for side, layers in shares.items()
        if layers
    }


def mean_share(runs: Sequence[Result], split: str) -> float | None:
    """Share of tokens sent to the expert, mean over runs and modules. `None` for methods without gates."""
    shares = [share for run in runs for share in run.get("gates", {}).get(split, {}).values()]
    return float(np.mean(shares)) if shares else None


# -------------------------------------------------------------------------------------------------------- main grid


def rates_by_cell(runs: Sequence[Result], split: str, name: str = "wer") -> dict[str, dict[str, dict[str, Any]]]:
    """
    Error rates by label and language: the `interval`, "seeds" (rate by seed) and "spread" (lowest and highest seed).

    Labels with all languages also have "mean", the macro average over languages.
    """
    runs = with_split(runs, split)
    cells = by_cell(runs)
    draws = {cell: rate(seeds, split, name) for cell, seeds in cells.items()}
    rows = with_mean(draws, in_order(runs), languages_of(runs))
    for (row, language), seeds in cells.items():
        rates = {run["settings"]["seed"]: float(rate([run], split, name)[0]) for run in seeds}
        rows[row][language] |= {"seeds": rates, "spread": [min(rates.values()), max(rates.values())]}
    return rows


def differences_by_cell(
    runs: Sequence[Result], reference: str, split: str, name: str = "wer"
) -> dict[str, dict[str, dict[str, float]]]:
    """`difference` in an error rate to the label `reference`, by label and language, if both have the language."""
    runs = with_split(runs, split)
    cells = by_cell(runs)
    languages = [language for language in languages_of(runs) if (reference, language) in cells]
    draws = {
        (row, language): difference(seeds, cells[reference, language], split, name)
        for (row, language), seeds in cells.items()
        if language in languages and row != reference
    }
    return with_mean(draws, in_order(runs), languages)


def with_mean(
    draws: dict[tuple[str, str], np.ndarray], rows: Sequence[str], languages: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Intervals by row and language, and of the mean over languages for rows that have all of them."""
    intervals: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        values = {language: draws[row, language] for language in languages if (row, language) in draws}
        if values:
            intervals[row] = {language: interval(value) for language, value in values.items()}
        if len(values) == len(languages) > 1:
            intervals[row]["mean"] = interval(np.mean(list(values.values()), axis=0))
    return intervals


def untouched(results: Sequence[Result]) -> list[dict[str, Any]]:
    """
    Error rates of other languages and scores of translation, for each label and language of the main grid, mean over
    seeds. "own" stands for the language that the run was trained on. WER is an `interval` of fractions; chrF and BLEU
    are from 0 to 100.
    """
    measured = [run for run in main_grid(results) if run.get("untouched")]
    cells = by_cell(measured)
    order = in_order(measured)
    rows = []
    for (row, language), runs in sorted(cells.items(), key=lambda cell: (order.index(cell[0][0]), cell[0][1])):
        rates: dict[str, Any] = {}
        for key, scores in runs[0]["untouched"].items():
            name = re.sub(rf"\b{language}\b", "own", key)
            if "utterances" in scores:
                rates[f"{name} WER"] = interval(rate(runs, key))
            else:
                for score in scores:
                    rates[f"{name} {score}"] = float(np.mean([run["untouched"][key][score] for run in runs]))
        rows.append({"method": row, "language": language, "runs": len(runs), "rates": rates})
    return rows


# -------------------------------------------------------------------------------------------------- changed settings


def mean_over_languages(runs: Sequence[Result], split: str, reference: Sequence[Result] | None = None) -> np.ndarray:
    """WER of one label's runs, or its difference to that of `reference`, mean over their languages: [1 + draws]."""
    here, there = (
        {lang: [r for r in some if r["settings"]["language"] == lang] for lang in languages_of(runs)}
        for some in (runs, reference or [])
    )
    if reference is None:
        return np.mean([rate(here[language], split) for language in here], axis=0)
    return np.mean([difference(here[language], there[language], split) for language in here], axis=0)


def variations(results: Sequence[Result]) -> list[dict[str, Any]]:
    """
    The effect of changed settings: for each label and change, WER by split, and its difference to the label's main
    runs of the same languages and seeds.
    """
    groups: dict[tuple[str, str], dict[tuple[str, int], Result]] = {}
    for result, changed in all_variations(results):
        groups.setdefault((label(result), json.dumps(changed, sort_keys=True)), {})[language_and_seed(result)] = result
    order = in_order(results)
    rows = []
    for (row, changed), runs in sorted(groups.items(), key=lambda group: (order.index(group[0][0]), group[0][1])):
        main = groups.get((row, "{}"), {})
        shared = sorted(set(runs) & set(main))
        if changed == "{}" or not shared:
            continue
        entry: dict[str, Any] = {"method": row, "changed": json.loads(changed), "runs": shared}
        for split in SPLITS:
            here, there = (with_split([some[pair] for pair in shared], split) for some in (runs, main))
            if here and len(here) == len(there):
                entry[split] = {
                    "wer": interval(mean_over_languages(here, split)),
                    "to_main": interval(mean_over_languages(here, split, there)),
                    "share": mean_share(here, split),
                }
        rows.append(entry)
    return rows


def swept_settings(results: Sequence[Result]) -> list[str]:
    """Settings that at least one run changes without changing another."""
    return sorted({name for _, changed in all_variations(results) if len(changed) == 1 for name in changed})


def sweep(results: Sequence[Result], setting: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """
    WER by value of a setting, or by "teacher": a `point` for each value, by split and label.

    Labels with one value are left out. The points of a label share languages and seeds; all labels share languages.
    """
    runs = [run for run, changed in all_variations(results) if set(changed) <= {setting}]
    runs = [run for run in runs if setting == "teacher" or setting in settings_that_matter(run)]
    numbers = {}
    for split in SPLITS:
        # Runs by label, value, and (language, seed).
        cells: dict[str, dict[Any, dict[tuple[str, int], Result]]] = {}
        for run in with_split(runs, split):
            if setting == "teacher":
                row, value = METHODS[method_of(run)[0]], method_of(run)[1] or "none"
            else:
                row, value = label(run), run["settings"][setting]
            cells.setdefault(row, {}).setdefault(value, {})[language_and_seed(run)] = run
        several = {row: values for row, values in cells.items() if len(values) > 1}
        shared = {row: set.intersection(*map(set, values.values())) for row, values in several.items()}
        languages = [{language for language, _ in pairs} for pairs in shared.values() if pairs]
        everywhere = set.intersection(*languages) if languages else set()
        order = [*in_order(runs), *METHODS.values()]
        numbers[split] = {
            row: [
                {"setting": value} | point([several[row][value][pair] for pair in pairs], split)
                for value in sorted(several[row], key=setting_order)
            ]
            for row in sorted(several, key=order.index)
            if (pairs := sorted(pair for pair in shared[row] if pair[0] in everywhere))
        }
    return {split: rows for split, rows in numbers.items() if rows}


def setting_order(value: Any) -> tuple[bool, bool, Any]:
    """Sort key for values of a setting: "none" first, `None` (no limit) last."""
    return value is None, value != "none", value


def point(runs: Sequence[Result], split: str) -> dict[str, Any]:
    """A point of a figure: means over the languages and seeds of the runs."""
    return {
        "wer": interval(mean_over_languages(runs, split)),
        "share": mean_share(runs, split),
        "train_utterances": float(np.mean([run["train_utterances"] for run in runs])),
        "trained_parameters": float(np.mean([run["trained_parameters"] for run in runs])),
        "languages": languages_of(runs),
        "seeds": sorted({run["settings"]["seed"] for run in runs}),
    }


def ranks(results: Sequence[Result], method: str, teacher: str | None) -> dict[int | None, list[Result]]:
    """
    A method's runs on the studied language by rank, in all seeds.

    The chosen rank has the chosen learning rate. Other ranks have that of their lowest WER on the validation split.
    """
    own = [
        run
        for run, changed in runs_of(results, method, teacher)
        if not changed and run["settings"]["language"] == STUDIED_LANGUAGE
    ]
    tried = [run for run in own if run["settings"]["seed"] == TUNING_SEED and "validation" in run["evaluations"]]
    choice = chosen(results, method, teacher)
    best: dict[int | None, Result] = {}
    for run in sorted(tried, key=lambda run: (tuning(run) != choice, run["evaluations"]["validation"]["wer"])):
        best.setdefault(tuning(run)[1], run)
    return {rank: [run for run in own if tuning(run) == tuning(best[rank])] for rank in sorted(best, key=str)}


def by_parameters(results: Sequence[Result]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """WER on the studied language by trained parameters: a `point` for each rank (see `ranks`), by split and label."""
    numbers: dict[str, dict[str, list[dict[str, Any]]]] = {split: {} for split in SPLITS}
    for method in dict.fromkeys(method_of(result) for result in results):
        for alike in ranks(results, *method).values():
            for split in SPLITS:
                if runs := with_split(alike, split):
                    settings = dict(zip(("learning_rate", "rank"), tuning(runs[0]), strict=True))
                    numbers[split].setdefault(label(runs[0]), []).append(settings | point(runs, split))
    order = in_order(results)
    return {
        split: {row: sorted(rows[row], key=lambda entry: entry["trained_parameters"]) for row in order if row in rows}
        for split, rows in numbers.items()
        if rows
    }


# ------------------------------------------------------------------------------------------------------------- gates


def gates_by_language(results: Sequence[Result]) -> dict[str, dict[str, dict[str, Any]]]:
    """`gate_shares` of the main grid by label, split and language."""
    return gates_by_line(dict(sorted(by_cell(main_grid(results)).items())))


def gates_by_size(results: Sequence[Result]) -> dict[str, dict[str, dict[str, Any]]]:
    """`gate_shares` on the studied language by label, split and number of training utterances."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for run, changed in all_variations(results):
        if set(changed) <= {"train_size"} and run["settings"]["language"] == STUDIED_LANGUAGE:
            groups.setdefault((label(run), run["train_utterances"]), []).append(run)
    return gates_by_line({(row, f"{size:,} utterances"): runs for (row, size), runs in sorted(groups.items())})


def gates_by_line(groups: dict[tuple[str, str], list[Result]]) -> dict[str, dict[str, dict[str, Any]]]:
    """`gate_shares` by label, split and line of a figure, for runs by label and line."""
    numbers: dict[str, dict[str, dict[str, Any]]] = {}
    for (row, line), runs in groups.items():
        for split in SPLITS:
            if shares := gate_shares(runs, split):
                numbers.setdefault(row, {}).setdefault(split, {})[line] = shares
    return numbers
