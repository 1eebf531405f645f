"""The numbers of the comparison: error rates with bootstrap intervals over utterances, and shares of tokens."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.comparison.grid import (
    CHARACTERS,
    METHODS,
    RATES,
    SPLITS,
    STUDIED_LANGUAGE,
    TUNING_SEED,
    WORDS,
    Result,
    all_variations,
    by_cell,
    chosen,
    evaluation,
    in_order,
    label,
    languages_of,
    main_grid,
    method_of,
    place,
    runs_of,
    settings_that_matter,
    tuning,
    with_split,
)

DRAWS = 2_000


@functools.lru_cache(maxsize=32)
def resamples(language: str, split: str, utterances: int) -> np.ndarray:
    """
    How often each utterance is in each bootstrap sample: integers, [1 + draws, utterances]. The first row is the data.

    The same for all methods, so that differences between them are paired; independent between languages.
    """
    generator = np.random.default_rng([utterances, *f"{language} {split}".encode()])
    draws = generator.multinomial(utterances, np.full(utterances, 1 / utterances), size=DRAWS)
    return np.concatenate([np.ones((1, utterances), dtype=draws.dtype), draws])


def rate(runs: Sequence[Result], split: str, name: str = "wer") -> np.ndarray:
    """
    The rate of a language's runs, mean over their seeds, in the data and in each bootstrap sample.

    Errors and words are pooled over utterances, which are resampled jointly for all seeds.

    Args:
        runs (`Sequence[dict]`): Runs of one method and language, one a seed.
        split (`str`): "validation", "test", "out_of_domain", or a language of "untouched".
        name (`str`, defaults to "wer"): One of `RATES`.

    Returns:
        `np.ndarray`: fractions, [1 + draws], the data's own first.

    Raises:
        ValueError: the runs' utterances differ in number or in length.
    """
    first, *others = runs
    for other in others:
        check_same_utterances(first, other, split)
    counts = np.sum([evaluation(run, split)["utterances"] for run in runs], axis=0)  # [utterances, 6]
    totals = resamples(first["settings"]["language"], split, len(counts)) @ counts
    errors, units = RATES[name]
    return totals[:, errors].sum(axis=-1) / totals[:, units]


def check_same_utterances(one: Result, other: Result, split: str) -> None:
    ours, theirs = (np.asarray(evaluation(run, split)["utterances"])[:, [WORDS, CHARACTERS]] for run in (one, other))
    if not np.array_equal(ours, theirs):
        raise ValueError(
            f"{one['name']} and {other['name']} were not evaluated on the same utterances of {split!r} "
            f"({len(ours)} and {len(theirs)} of them): run one of them again"
        )


def difference(runs: Sequence[Result], reference: Sequence[Result], split: str, name: str = "wer") -> np.ndarray:
    """`rate` of `runs` less that of `reference` on the same utterances, below 0 where `runs` are better."""
    check_same_utterances(runs[0], reference[0], split)
    return rate(runs, split, name) - rate(reference, split, name)


def interval(values: np.ndarray) -> dict[str, float]:
    """The data's value, and the 95 % percentile interval of the bootstrap samples."""
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def gate_shares(runs: Sequence[Result], split: str) -> dict[str, dict[int, float]]:
    """Share of tokens sent to the expert, mean over runs: "encoder" and "decoder" to layer to share."""
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
    """Mean over runs and modules. `None` for methods without gates."""
    shares = [share for run in runs for share in run.get("gates", {}).get(split, {}).values()]
    return float(np.mean(shares)) if shares else None


# -------------------------------------------------------------------------------------------------------- main grid


def rates_by_cell(runs: Sequence[Result], split: str, name: str = "wer") -> dict[str, dict[str, dict[str, Any]]]:
    """
    Label to language to the `interval` of its rate, "seeds" to the rate of each seed, and "spread", the lowest and the
    highest of these. "mean", the macro average, stands where a label has all languages.
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
    """As `rates_by_cell`, of the `difference` in a rate to the label `reference`, in the languages that both have."""
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
    """The intervals of the draws by row and language, and those of the mean of rows that have all languages."""
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
    What the training of the main grid was not about: for each label and language, rates by what was measured, mean
    over seeds. "own" stands for the run's own language. WER is an `interval` of fractions; chrF and BLEU are of 100.
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
    """WER of one label's runs, or its difference to that of other runs, mean over their languages: [1 + draws]."""
    here, there = (
        {lang: [r for r in some if place(r)[0] == lang] for lang in languages_of(runs)}
        for some in (runs, reference or [])
    )
    if reference is None:
        return np.mean([rate(here[language], split) for language in here], axis=0)
    return np.mean([difference(here[language], there[language], split) for language in here], axis=0)


def variations(results: Sequence[Result]) -> list[dict[str, Any]]:
    """
    What a change of settings does: for each label and change, the WER by split, and the difference to the label's main
    runs of the same languages and seeds.
    """
    groups: dict[tuple[str, str], dict[tuple[str, int], Result]] = {}
    for result, changed in all_variations(results):
        groups.setdefault((label(result), json.dumps(changed, sort_keys=True)), {})[place(result)] = result
    order = in_order(results)
    rows = []
    for (row, changed), runs in sorted(groups.items(), key=lambda group: (order.index(group[0][0]), group[0][1])):
        main = groups.get((row, "{}"), {})
        shared = sorted(set(runs) & set(main))
        if changed == "{}" or not shared:
            continue
        entry: dict[str, Any] = {"method": row, "changed": json.loads(changed), "runs": shared}
        for split in SPLITS:
            here, there = (with_split([some[where] for where in shared], split) for some in (runs, main))
            if here and len(here) == len(there):
                entry[split] = {
                    "wer": interval(mean_over_languages(here, split)),
                    "to_main": interval(mean_over_languages(here, split, there)),
                    "share": mean_share(here, split),
                }
        rows.append(entry)
    return rows


def swept_settings(results: Sequence[Result]) -> list[str]:
    """The settings that some run changes alone."""
    return sorted({name for _, changed in all_variations(results) if len(changed) == 1 for name in changed})


def sweep(results: Sequence[Result], setting: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """
    Split to label to `point`s by value of the setting, or by "teacher", where a label has two values at least.

    All points of a label are of the same languages and seeds, and all labels of the same languages.
    """
    runs = [run for run, changed in all_variations(results) if set(changed) <= {setting}]
    runs = [run for run in runs if setting == "teacher" or setting in settings_that_matter(run)]
    numbers = {}
    for split in SPLITS:
        # Label to value to language and seed to run.
        cells: dict[str, dict[Any, dict[tuple[str, int], Result]]] = {}
        for run in with_split(runs, split):
            if setting == "teacher":
                row, value = METHODS[method_of(run)[0]], method_of(run)[1] or "none"
            else:
                row, value = label(run), run["settings"][setting]
            cells.setdefault(row, {}).setdefault(value, {})[place(run)] = run
        several = {row: values for row, values in cells.items() if len(values) > 1}
        shared = {row: set.intersection(*map(set, values.values())) for row, values in several.items()}
        languages = [{language for language, _ in places} for places in shared.values() if places]
        everywhere = set.intersection(*languages) if languages else set()
        order = [*in_order(runs), *METHODS.values()]
        numbers[split] = {
            row: [
                {"setting": value} | point([several[row][value][where] for where in places], split)
                for value in sorted(several[row], key=setting_order)
            ]
            for row in sorted(several, key=order.index)
            if (places := sorted(where for where in shared[row] if where[0] in everywhere))
        }
    return {split: rows for split, rows in numbers.items() if rows}


def setting_order(value: Any) -> tuple[bool, bool, Any]:
    """By which the values of a setting are sorted: "none" first, no limit last."""
    return value is None, value != "none", value


def point(runs: Sequence[Result], split: str) -> dict[str, Any]:
    """Runs as a point of a figure: means over languages and seeds."""
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
    A method's runs on the studied language by rank, in all seeds: those with the chosen learning rate where it is of
    that rank, else with that of the rank's lowest WER on the validation split.
    """
    own = [
        run for run, changed in runs_of(results, method, teacher) if not changed and place(run)[0] == STUDIED_LANGUAGE
    ]
    tried = [run for run in own if place(run)[1] == TUNING_SEED and "validation" in run["evaluations"]]
    choice = chosen(results, method, teacher)
    best: dict[int | None, Result] = {}
    for run in sorted(tried, key=lambda run: (tuning(run) != choice, run["evaluations"]["validation"]["wer"])):
        best.setdefault(tuning(run)[1], run)
    return {rank: [run for run in own if tuning(run) == tuning(best[rank])] for rank in sorted(best, key=str)}


def by_parameters(results: Sequence[Result]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Split to label to `point`s by rank, see `ranks`, on the studied language."""
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
    """Label to split to language to `gate_shares`, in the main grid."""
    return gates(dict(sorted(by_cell(main_grid(results)).items())))


def gates_by_size(results: Sequence[Result]) -> dict[str, dict[str, dict[str, Any]]]:
    """Label to split to number of utterances trained on to `gate_shares`, on the studied language."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for run, changed in all_variations(results):
        if set(changed) <= {"train_size"} and place(run)[0] == STUDIED_LANGUAGE:
            groups.setdefault((label(run), run["train_utterances"]), []).append(run)
    return gates({(row, f"{size:,} utterances"): runs for (row, size), runs in sorted(groups.items())})


def gates(groups: dict[tuple[str, str], list[Result]]) -> dict[str, dict[str, dict[str, Any]]]:
    numbers: dict[str, dict[str, dict[str, Any]]] = {}
    for (row, line), runs in groups.items():
        for split in SPLITS:
            if shares := gate_shares(runs, split):
                numbers.setdefault(row, {}).setdefault(split, {})[line] = shares
    return numbers
