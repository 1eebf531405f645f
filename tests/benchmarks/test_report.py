"""The report of the comparison, on made-up results."""

import json

import numpy as np
import pytest

from benchmarks.comparison import estimates, figures, methods, report, selection
from benchmarks.comparison.store import encode, load, write_table

DEFAULTS = {
    "seed": 0,
    "teacher": None,
    "rank": None,
    "train_size": 400,
    "epochs": 3,
    "audio_seconds": 3.0,
    "kd_loss": "js",
    "kd_weight": 2.0,
    "gate_budget": 0.5,
    "skip_gate_prob": 0.2,
    "gate_noise": 5.0,
    "straight_through": False,
    "decoder_layers": None,
    "student": "whisper-base",
}
LEARNING_RATES = {"full": 5e-5, "lora": 1e-3, "clsr": 5e-4, "zero-shot": None, "low-rank": 2e-3, "straight": 1e-3}


def rates(errors, words=4):
    """An evaluation: errors of each utterance, all substitutions; one character error a word error."""
    rows = [[count, 0, 0, words, count, 5 * words] for count in errors]
    total = words * len(errors)
    return {"wer": sum(errors) / total, "cer": sum(errors) / (5 * total), "utterances": rows}


def made_up(method, language="ro", errors=(1, 0, 2, 1), **settings):
    """A result as `compare` writes it, with the same errors in and out of domain and in validation."""
    if method in ("lora", "low-rank", "straight"):
        settings = {"rank": 64} | settings
    settings = methods.METHOD_SETTINGS.get(method, {}) | settings
    settings = DEFAULTS | {"learning_rate": LEARNING_RATES[method]} | settings
    result = {
        "settings": {"method": method, "language": language} | settings,
        "machine": {"device": "test"},
        "evaluations": {split: rates(errors) for split in ("validation", "test", "out_of_domain")},
        "gates": {},
    }
    if method in methods.ROUTED:
        shares = {f"model.{side}.layers.{layer}.fc1": 0.25 for side in ("encoder", "decoder") for layer in range(2)}
        result["gates"] = {"test": shares, "out_of_domain": shares}
    if method != "zero-shot":
        result |= {"trained_parameters": 1000, "train_seconds": 7.0, "train_steps": 3}
        result["train_utterances"] = settings["train_size"]
    told = {key: value for key, value in result["settings"].items() if value != DEFAULTS.get(key)}
    result["name"] = "_".join(f"{key}={value}" for key, value in told.items())
    return result


def write(folder, results):
    """Writes results as a table of whisper-base."""
    named = [{key: value for key, value in result.items() if key != "name"} for result in results]
    write_table(folder / "whisper-base", [encode(result, "main") for result in named])
    return folder


def whole_grid():
    """Every method in two languages and two seeds, and a change of each setting that has a figure."""
    results = [made_up("zero-shot", language, (4, 6, 5, 4)) for language in ("ro", "bg")]
    for seed in (0, 1):
        for language in ("ro", "bg"):
            results += [
                made_up("full", language, (1, 1, 2, 1), seed=seed),
                made_up("lora", language, (1, 0, 2, seed), seed=seed),
                made_up("clsr", language, (1, 1, 1, 1), seed=seed),
                made_up("clsr", language, (0, 1, 1, 0), seed=seed, teacher="finetuned"),
            ]
    taught = {"method": "clsr", "teacher": "finetuned"}
    results += [
        made_up(**taught, errors=errors, **change)
        for errors, change in (
            ((3, 2, 1, 2), {"train_size": 100}),
            ((2, 2, 1, 2), {"train_size": 200}),
            ((2, 1, 1, 1), {"gate_budget": 0.25}),
            ((0, 1, 0, 0), {"skip_gate_prob": 0.0}),
            ((0, 2, 1, 0), {"kd_loss": "kl"}),
            ((0, 2, 2, 2), {"kd_loss": "kl", "skip_gate_prob": 0.0}),
        )
    ]
    for result in results[:2] + results[3:4]:  # the unchanged model, and LoRA in Romanian
        result["untouched"] = {"es": rates((1, 2, 0, 1))}
    return [*results, made_up("lora", errors=(2, 2, 2, 2), rank=32)]


# --------------------------------------------------------------------------------------------------------- bootstrap


def test_wer_is_pooled_over_utterances_not_averaged():
    result = made_up("lora")
    result["evaluations"]["test"] = {"utterances": [[1, 0, 0, 1, 1, 5], [0, 1, 1, 9, 2, 45]]}
    assert estimates.rate([result], "test")[0] == 3 / 10  # the mean of the utterances' rates is 0.61
    assert estimates.rate([result], "test", "cer")[0] == 3 / 50
    assert estimates.rate([result], "test", "insertions")[0] == 1 / 10


def test_wer_of_several_seeds_is_their_mean():
    one, other = made_up("lora", errors=(0, 0, 1, 1)), made_up("lora", errors=(4, 2, 0, 0), seed=1)
    assert estimates.rate([one, other], "test")[0] == (2 / 16 + 6 / 16) / 2


def test_interval_is_as_wide_as_the_binomial_distribution_says():
    utterances, error_rate = 400, 0.3
    errors = np.arange(utterances) < error_rate * utterances
    result = made_up("lora")
    result["evaluations"]["test"] = rates(errors.astype(int).tolist(), words=1)
    estimate = estimates.interval(estimates.rate([result], "test"))
    half = 1.96 * (error_rate * (1 - error_rate) / utterances) ** 0.5  # 0.045
    assert estimate["value"] == error_rate
    assert estimate["low"] == pytest.approx(error_rate - half, abs=0.005)
    assert estimate["high"] == pytest.approx(error_rate + half, abs=0.005)


def test_interval_of_utterances_that_are_all_alike_has_no_width():
    assert estimates.interval(estimates.rate([made_up("lora", errors=(1, 1, 1))], "test")) == {
        "value": 0.25,
        "low": 0.25,
        "high": 0.25,
    }


def test_difference_is_paired_by_utterance_and_negative_where_the_method_is_better():
    hard_and_easy = np.array([4, 0, 3, 0, 4, 1, 0, 4] * 10)
    lora = made_up("lora", errors=(hard_and_easy + 1).tolist())
    clsr = made_up("clsr", errors=hard_and_easy.tolist())
    # One error less in each utterance of four words: whatever the sample, a quarter.
    assert estimates.interval(estimates.difference([clsr], [lora], "test")) == pytest.approx(
        {"value": -0.25, "low": -0.25, "high": -0.25}
    )
    width = estimates.interval(estimates.rate([clsr], "test"))
    assert width["high"] - width["low"] > 0.15  # the error rate itself is far less certain
    assert estimates.interval(estimates.difference([lora], [clsr], "test"))["value"] == pytest.approx(0.25)


def test_languages_are_resampled_independently():
    ro, ca = (estimates.resamples(language, "test", 50) for language in ("ro", "ca"))
    assert (ro[0] == 1).all() and (ro.sum(axis=1) == 50).all()
    assert not np.array_equal(ro[1:], ca[1:])


def test_differences_are_in_words_or_in_characters():
    results = [made_up("lora"), made_up("clsr"), made_up("clsr", teacher="finetuned")]
    for result, characters in zip(results, (4, 1, 2), strict=True):
        result["evaluations"]["test"] = {"utterances": [[1, 0, 0, 4, characters, 20]] * 3}
    words, letters = (estimates.differences_by_cell(results, "LoRA", "test", name) for name in ("wer", "cer"))
    assert words["CLSR"]["ro"]["value"] == 0 and letters["CLSR"]["ro"]["value"] == pytest.approx(-3 / 20)
    lines = [line for line in report.difference_tables(results, "test", "cer") if line]
    assert lines == [
        "Difference to LoRA in CER in domain, points, on the same utterances (below 0: better):",
        "| method | ro |",
        "| --- | --- |",
        "| CLSR | -15.0 [-15.0, -15.0] |",
        "| CLSR + KD | -10.0 [-10.0, -10.0] |",
        "Difference that the teacher makes to the same method in CER in domain, points:",
        "| method | ro |",
        "| --- | --- |",
        "| CLSR + KD | +5.0 [+5.0, +5.0] |",
    ]


def test_runs_on_other_utterances_are_not_compared():
    with pytest.raises(ValueError, match="not evaluated on the same utterances of 'test' \\(4 and 3 of them\\)"):
        estimates.difference([made_up("clsr")], [made_up("lora", errors=(1, 0, 2))], "test")


# ------------------------------------------------------------------------------------------------------- the grouping


def tried(candidates, method="lora", **settings):
    """Runs of learning rate and rank to language to errors in each utterance, of 4 words."""
    return [
        made_up(method, language, errors, learning_rate=learning_rate, rank=rank, **settings)
        for (learning_rate, rank), languages in candidates.items()
        for language, errors in languages.items()
    ]


def test_chosen_is_the_candidate_of_the_lowest_validation_wer_mean_over_both_languages():
    none, one, two = ([errors] * 4 for errors in (0, 1, 2))
    results = tried(
        {
            (5e-4, 64): {"ro": two, "bg": two, "ca": none},  # Catalan is no tuning language
            (1e-3, 32): {"ro": two, "bg": none},
            (2e-3, 32): {"ro": one, "bg": [1, 1, 0, 1]},
            (1e-3, 64): {"ro": none, "bg": two},
            (4e-3, 64): {"bg": none},  # not tried in Romanian
            (1e-3, 8): {"ro": none, "bg": none},  # not a candidate
        }
    )
    results[0]["evaluations"]["test"] = results[1]["evaluations"]["test"] = rates(none)  # tuning is by validation,
    results += tried({(2e-3, 64): {"ro": two, "bg": two}})
    results += tried({(2e-3, 64): {"ro": none, "bg": none}}, seed=1)  # of seed 0,
    results += tried({(5e-4, 64): {"ro": none, "bg": none}}, train_size=100)  # with the main settings,
    results += tried({(1e-3, None): {"ro": none}}, "clsr")  # of the method
    assert selection.chosen(results, "lora") == (2e-3, 32)
    assert selection.chosen(results, "clsr") == (1e-3, None)  # the only one in use
    assert selection.chosen(results, "clsr", "finetuned") is None


def test_candidates_that_lack_a_language_do_not_count_and_ties_go_to_the_first():
    one, other, partial = (1e-3, 64), (2e-3, 64), (4e-3, 64)
    assert selection.best_candidate({partial: {"ro": 0.0}, other: {"ro": 0.5, "bg": 0.5}}) == other
    assert selection.best_candidate({one: {"ro": 0.25, "bg": 0.5}, other: {"ro": 0.5, "bg": 0.25}}) == one
    assert selection.best_candidate({other: {"ro": 0.5, "bg": 0.25}, one: {"ro": 0.25, "bg": 0.5}}) == other
    assert selection.best_candidate({one: {"ro": 0.1}, other: {"bg": 0.1}, partial: {}}) is None
    results = tried({one: {"ro": [1] * 4}, other: {"ro": [2] * 4}})
    assert selection.chosen(results, "lora") is None and selection.main_grid(results) == []


def test_tuning_has_a_column_a_language_and_the_choice_in_bold():
    results = tried(
        {
            (2e-3, 64): {"bg": [1] * 4, "ro": [1] * 4},
            (5e-4, 64): {"ro": [0] * 4},
            (1e-3, 32): {"ro": [0] * 4, "bg": [3] * 4},
        }
    )
    lines = report.tuning_section([*results, made_up("full", errors=[1] * 4), made_up("zero-shot")])
    assert [line for line in lines if line.startswith("|")] == [
        "| method | learning rate | ro | bg |",
        "| --- | --- | --- | --- |",
        "| full fine-tuning | 5e-05 | 25.0 | - |",
        "| LoRA | 0.001, rank 32 | 0.0 | 75.0 |",
        "| LoRA | 0.0005, rank 64 | 0.0 | - |",
        "| LoRA | **0.002, rank 64** | 25.0 | 25.0 |",
    ]
    assert report.tuning_section([made_up("zero-shot")]) == []


def test_a_rank_has_the_chosen_learning_rate_or_that_of_its_lowest_validation_wer():
    none, one, four = ([errors] * 4 for errors in (0, 1, 4))
    results = tried(
        {
            (1e-3, 64): {"ro": none, "bg": four},
            (2e-3, 64): {"ro": one, "bg": one},
            (2e-3, 32): {"ro": one},
            (1e-3, 32): {"ro": none},
        }
    )
    results += tried({(2e-3, 64): {"ro": one}}, seed=1)
    by_rank = estimates.ranks(results, "lora", None)
    assert {
        rank: [(selection.tuning(run)[0], *selection.language_and_seed(run)) for run in runs]
        for rank, runs in by_rank.items()
    } == {
        32: [(1e-3, "ro", 0)],
        64: [(2e-3, "ro", 0), (2e-3, "ro", 1)],
    }


def test_main_grid_has_each_method_with_its_own_tuning_and_the_main_settings_only():
    results = whole_grid()
    main = selection.main_grid(results)
    assert len(main) == 2 + 4 * 4
    assert {run["settings"]["train_size"] for run in main} == {400}
    assert {run["settings"]["rank"] for run in main if run["settings"]["method"] == "lora"} == {64}
    cells = selection.by_cell(main)
    assert [run["settings"]["seed"] for run in cells["CLSR + KD", "bg"]] == [0, 1]


def test_settings_that_a_method_does_not_use_do_not_part_its_runs():
    results = [made_up("lora", gate_budget=0.9), made_up("lora", "ca"), made_up("clsr", kd_weight=9.0)]
    assert len(selection.main_grid(results)) == 3


def test_labels_tell_teachers_contexts_and_students_apart():
    results = [
        made_up("zero-shot", audio_seconds=30.0),
        made_up("low-rank", teacher="finetuned"),
        made_up("low-rank", teacher="base"),
        made_up("clsr", decoder_layers=3),
    ]
    assert selection.in_order(results) == [
        "whisper-base, zero-shot (30 s)",
        "CLSR",
        "low-rank CLSR + KD",
        "low-rank CLSR + KD (base teacher)",
    ]
    assert list(selection.of_students(results)) == ["whisper-base", "whisper-base with 3 decoder layers"]


def test_straight_through_is_a_method_of_its_own_and_as_a_change_is_compared_with_low_rank():
    changed = {"straight_through": True, "gate_noise": 0.0}
    results = [made_up("low-rank"), made_up("low-rank", errors=(1, 1, 1, 2), **changed)]
    results += [made_up("low-rank", "ca"), made_up("straight"), made_up("straight", teacher="finetuned")]
    rows = ["low-rank CLSR", "CLSR, straight-through", "CLSR, straight-through + KD"]
    assert selection.in_order(results) == rows
    assert len(selection.main_grid(results)) == 4
    (entry,) = estimates.variations(results)
    assert (entry["method"], entry["changed"]) == (rows[0], changed)
    assert entry["test"]["to_main"]["value"] == 1 / 16


def test_methods_look_different():
    alone = [name for method, name in methods.METHODS.items() if method not in ("zero-shot", "low-rank")]
    rows = [*alone, "low-rank CLSR", *(f"{methods.METHODS[method]} + KD" for method in methods.ROUTED)]
    looks = [tuple(figures.look(row).values()) for row in ("whisper-base, zero-shot (3 s)", *rows)]
    for each in zip(*looks, strict=True):
        assert len(set(each)) == len(rows) + 1 == 9


def test_same_run_twice_is_refused():
    with pytest.raises(ValueError, match="are the same run \\(LoRA, ro, seed 0\\): remove one"):
        selection.by_cell([made_up("lora"), made_up("lora", gate_budget=0.9)])


def test_rates_that_are_not_those_of_the_utterances_are_refused(tmp_path):
    result = made_up("lora")
    result["evaluations"]["test"]["wer"] = 0.2
    with pytest.raises(ValueError, match="the wer of 'test' is 0.2, but its utterances give 0.250000"):
        load(write(tmp_path, [result]))


def test_run_of_all_languages_counts_in_each(tmp_path):
    result = made_up("full", "all")
    result["evaluations"] = {"ro test": rates((1, 1)), "ca test": rates((2, 2))}
    results = load(write(tmp_path, [result, made_up("full", errors=(2, 0))]))
    rows = estimates.rates_by_cell(selection.main_grid(results), "test")
    together = rows["full fine-tuning of all languages together"]
    assert (together["ro"]["value"], together["ca"]["value"], together["mean"]["value"]) == (0.25, 0.5, 0.375)
    assert rows["full fine-tuning"]["ro"]["value"] == 0.25


# -------------------------------------------------------------------------------------------------- numbers and files


def test_sweep_compares_the_same_languages_and_seeds():
    points = estimates.sweep(whole_grid(), "train_size")["test"]["CLSR + KD"]
    assert [point["setting"] for point in points] == [100, 200, 400]
    assert [point["wer"]["value"] for point in points] == [8 / 16, 7 / 16, 2 / 16]
    assert all((point["languages"], point["seeds"]) == (["ro"], [0]) for point in points)


def test_changes_of_several_settings_are_compared_with_the_main_run():
    (both,) = [entry for entry in estimates.variations(whole_grid()) if len(entry["changed"]) == 2]
    assert both["changed"] == {"kd_loss": "kl", "skip_gate_prob": 0.0}
    assert both["test"]["to_main"]["value"] == 6 / 16 - 2 / 16
    assert both["test"]["share"] == 0.25


def test_mean_over_languages_stands_only_where_all_are_there():
    results = [run for run in whole_grid() if run["settings"]["method"] != "lora"]
    results += [made_up("lora", errors=(1, 0, 2, seed), seed=seed) for seed in (0, 1)]
    rows = estimates.rates_by_cell(selection.main_grid(results), "test")
    assert "mean" in rows["CLSR"] and set(rows["LoRA"]) == {"ro"}
    assert rows["LoRA"]["ro"]["spread"] == [3 / 16, 4 / 16]


def test_gates_are_reported_of_the_runs_that_were_measured_without_them():
    straight, clsr = made_up("straight", errors=(1, 0, 0, 0), seed=1), made_up("clsr", teacher="finetuned")
    logits = {"encoder": {"mean": -3.0, "std": 1.0}, "decoder": {"mean": 1.0, "std": 0.5}}
    for run, errors in ((straight, (1, 1, 0, 0)), (clsr, (2, 0, 2, 1))):
        run["gate_logits"] = {f"model.{side}.layers.0.fc1": logit for side, logit in logits.items()}
        run["gate_logits"]["model.encoder.layers.1.fc1"] = {"mean": 20.0, "std": 0.75}
        run["without_gates"] = {
            "all to the expert": {"test": rates(errors), "out_of_domain": rates((4, 4, 4, 4))},
            "half at random": {"test": rates((1, 1, 1, 1)), "out_of_domain": rates((4, 4, 4, 0))},
        }
    # Measured too, but of another learning rate than tuning chose.
    other = made_up("clsr", teacher="finetuned", errors=(4, 4, 4, 4), learning_rate=2e-4)
    other |= {key: clsr[key] for key in ("gate_logits", "without_gates")}
    tuned = [made_up("clsr", "bg", teacher="finetuned", learning_rate=learning_rate) for learning_rate in (2e-4, 5e-4)]
    lines = report.gates_section([straight, other, made_up("lora"), made_up("straight"), clsr, *tuned])
    assert [line for line in lines if line.startswith("|")] == [
        "| method | language | seed | in domain: its gates | in domain: all to the expert | in domain: half at random "
        "| out of domain: its gates | out of domain: all to the expert | out of domain: half at random "
        "| logit mean | over tokens | noise |",
        "| --- " * 12 + "|",
        "| CLSR + KD | ro | 0 | 25.0 | 31.2 | 25.0 | 25.0 | 100.0 | 75.0 | 3.00 | 0.75 | 5 |",
        "| CLSR, straight-through | ro | 1 | 6.2 | 12.5 | 25.0 | 6.2 | 100.0 | 75.0 | 3.00 | 0.75 | 5 |",
    ]
    assert report.gates_section([made_up("straight"), made_up("lora")]) == []


def test_report_of_a_grid_has_all_tables_and_figures_and_the_same_bytes_again(tmp_path, capsys):
    results = write(tmp_path / "results", whole_grid())
    for output in ("one", "other"):
        estimates.resamples.cache_clear()
        report.main(["--results_dir", str(results), "--output_dir", str(tmp_path / output)])
    assert "not drawn" not in capsys.readouterr().out
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / output).iterdir()} for output in ("one", "other")
    )
    assert one == other
    figures = {name for name in one if name.endswith(".png")}
    assert figures == set(json.loads(one["numbers.json"]))
    assert {"overview.png", "wer.png", "size.png", "parameters.png", "budget.png", "ablations.png"} <= figures
    assert {"gates-clsr-kd.png", "gates-by-size-clsr-kd.png"} <= figures
    numbers = json.loads(one["numbers.json"])["overview.png"]
    assert list(numbers["trained"]) == list(numbers["Spanish"]) == ["whisper-base, zero-shot (3 s)", "LoRA"]
    assert numbers["trained"]["LoRA"]["value"] == pytest.approx(0.21875) != numbers["Spanish"]["LoRA"]["value"]
    tables = one["tables.md"].decode()
    assert "Runs: 25, of which\n\n- 25 on device test\n" in tables
    assert "| CLSR + KD | 12.5 [0.0, 25.0] | 12.5 [0.0, 25.0] | 12.5 [" in tables
    assert "| CLSR + KD | -9.4 [" in tables  # to LoRA: 12.5 less 21.9
    assert "| CLSR + KD | -1.9 [" in tables  # in CER, of 5 characters a word
    assert "| LoRA | 0.001, rank 32 | 50.0 | - |" in tables
    assert "| LoRA | **0.001, rank 64** | 18.8 | 18.8 |" in tables
    assert "| LoRA | 18.8 to 25.0 | 18.8 to 25.0 |" in tables


def test_report_of_a_partial_grid_names_what_is_missing(tmp_path, capsys):
    kept = [run for run in whole_grid() if run["settings"]["method"] != "clsr" or run["settings"]["train_size"] == 200]
    kept = [run for run in kept if (run["settings"]["method"], *selection.language_and_seed(run)) != ("lora", "bg", 1)]
    write(tmp_path / "results", kept)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.png").write_bytes(b"")
    (tmp_path / "out" / "mine.png").write_bytes(b"")
    (tmp_path / "out" / "numbers.json").write_text('{"old.png": {}}')
    report.main(["--results_dir", str(tmp_path / "results"), "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "not drawn: budget.png, its runs are missing" in printed
    assert "not drawn: size.png, its runs are missing" in printed
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "overview.png",
        "wer.png",
        "parameters.png",
        "mine.png",
    }
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert "| LoRA | 3 | 0.001, rank 64 | - | bg 1 |" in tables


def test_nothing_to_report_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main(["--results_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    assert "run python -m benchmarks.comparison.compare first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
