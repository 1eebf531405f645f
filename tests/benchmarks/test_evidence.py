"""The second round: folds, the order of its runs, what a run trains and measures, intervals, and the report."""

import csv
import gzip
import hashlib
import json
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from evidence_runs import made_up_results, small, tuning_of, validated_alone, write_tuning
from safetensors.torch import load_file

from benchmarks.comparison import compare, experiment
from benchmarks.comparison.experiment import KDDecay, execute, read_split, validate
from benchmarks.comparison.folds import LANGUAGES, parts
from benchmarks.comparison.runs import Run, teacher_run
from benchmarks.comparison.store import ResultStore, read_table
from benchmarks.evidence import estimates, grid, report, run, speech
from benchmarks.evidence.ability_table import AbilityTable

# ------------------------------------------------------------------------------------------------------- recordings


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_committed_list_has_each_recording_in_one_fold(language):
    with open(speech.LISTS / f"{language}.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    sizes = Counter(row["split"] for row in rows)
    assert sizes.pop("out_of_domain") == (233 if language == "ru" else 100)
    assert set(sizes) == {"fold0", "fold1", "fold2"} and max(sizes.values()) - min(sizes.values()) <= 1
    assert min(sizes.values()) > 150
    for column in ("name", "sha256"):
        assert len({row[column] for row in rows}) == len(rows)
    assert all(re.fullmatch("[0-9a-f]{64}", row["sha256"]) for row in rows)


@pytest.mark.parametrize("fold", [0, 1, 2])
def test_a_run_is_tested_validated_and_trained_on_different_recordings(fold):
    folds = {f"fold{number}": [f"{number}-{place}" for place in range(100)] for number in range(3)}
    test, validation, train = (
        [row for name, kept in parts(split, fold) for row in folds[name][kept]]
        for split in ("test", "validation", "train")
    )
    assert test == folds[f"fold{fold}"]  # so each recording is in the test of one fold
    assert len(validation) == 60
    assert Counter(test + validation + train) == Counter(row for rows in folds.values() for row in rows)


def test_texts_that_are_the_same_are_in_one_fold(tmp_path, monkeypatch):
    folder = tmp_path / "stamps"
    folder.mkdir()
    for number in range(12):
        text = f"O floare numărul {number}" if number else "O floare numarul 1."  # the text of another, normalized
        (folder / f"{number:02}.txt").write_text(f"Flower\nro.utf8={text}\n", encoding="utf-8")
        soundfile.write(folder / f"{number:02}_desc_ro.ogg", np.full(16000 * 5, 0.1), 16000)
    monkeypatch.setattr(speech, "read_messages", lambda packages, language: dict.fromkeys("abc", "text"))
    rows = speech.list_language(folder, tmp_path, "ro")
    assert Counter(row["split"] for row in rows) == {"fold0": 4, "fold1": 4, "fold2": 3, "out_of_domain": 3}
    assert len({row["name"] for row in rows} & {"00_desc_ro.ogg", "01_desc_ro.ogg"}) == 1


def test_announcements_are_sentences_without_what_nobody_says(tmp_path):
    texts = {
        "busy": "Все линии  заняты.",
        "again": "Все линии заняты.",
        "one": "Спасибо",
        "tone": "[ascending tones]",
        "digit": "Нажмите 1 сейчас",
        "long": "Очень длинное объявление",
        "fast": "Слишком много слов для такой короткой записи",
        "silent": "Нет такой записи",
    }
    folder = tmp_path / speech.ANNOUNCEMENTS
    folder.mkdir()
    lines = "; Core Sounds\n" + "".join(f"{name}: {text}\n" for name, text in texts.items())
    (folder / "core-sounds-ru.txt.gz").write_bytes(gzip.compress(lines.encode()))
    audio = tmp_path / speech.ANNOUNCEMENTS_AUDIO
    audio.mkdir()
    for name in texts.keys() - {"silent"}:
        seconds = {"long": 13, "fast": 1}.get(name, 2)
        (audio / f"{name}.g722").write_bytes(bytes(8000 * seconds))
    assert speech.read_announcements(tmp_path) == {"busy": (audio / "busy.g722", "Все линии заняты.")}

    row = {"name": "busy.wav"}
    text, digest = speech.announced(tmp_path)(row, tmp_path / "busy.wav")
    assert (text, digest) == ("Все линии заняты.", hashlib.sha256(bytes(16000)).hexdigest())
    info = soundfile.info(tmp_path / "busy.wav")
    assert (info.samplerate, info.channels) == (16000, 1) and info.duration == pytest.approx(2, abs=0.05)
    assert speech.announced(tmp_path)({"name": "other.wav"}, tmp_path / "other.wav") == (None, "")


# ------------------------------------------------------------------------------------------------------- the grid


@pytest.fixture
def store(tmp_path):
    return ResultStore(tmp_path / "results", tmp_path / "work", "whisper-base")


@pytest.fixture
def tuned(store):
    made = grid.Grid(store)
    write_tuning(made)
    return made


def test_each_method_has_as_many_passes_and_is_tuned_on_validation_in_one_fold(store):
    made = grid.Grid(store)
    tuning = [each for group in grid.GROUPS for each in made.tuning(group)]
    assert {(each.epochs, each.batch_size, each.train_size, each.audio_seconds) for each in tuning} == {
        (4, 1, None, 30)
    }
    assert {(each.language, each.fold, each.teacher) for each in tuning} == {("ro", 0, None), ("be", 0, None)}
    tried = Counter(each.method for each in dict.fromkeys(tuning))
    assert tried == {name: 2 * len(candidates) for name, candidates in grid.CANDIDATES.items()}
    assert made.tuning("gates") == made.candidates("expert")
    trial = grid.Grid(store, max_steps=2)
    assert len(trial.candidates("full")) == 2 < len(made.candidates("full"))


def test_the_lowest_validation_wer_chooses_learning_rates_for_taught_rows_too(tuned):
    assert tuned.chosen("lora") == {"learning_rate": 4e-3, "rank": 32}
    other = next(each for each in tuned.candidates("lora") if each.learning_rate == 1e-3)  # the worst so far
    for language in ("ro", "be"):
        tuned.store.write(replace(other, language=language), made_up_results(other, 0.01))
    with pytest.raises(ValueError, match="ru_lora_.*=0.001.* has no results"):  # it is compared in Russian first
        tuned.chosen("lora")
    tuned.store.write(replace(other, language="ru"), made_up_results(other, 0.01))
    assert tuned.chosen("lora") == {"learning_rate": 1e-3, "rank": 32}
    tuned.store.write(replace(other, language="ru"), made_up_results(other, 3.0))
    assert tuned.chosen("lora") == {"learning_rate": 4e-3, "rank": 32}
    tuned.store.write(replace(other, language="ru"), made_up_results(other, 0.01))
    taught = tuned.runs("kd")
    assert {(each.teacher, each.learning_rate, each.rank) for each in taught} == {
        ("finetuned", *tuned.chosen("expert").values())
    }
    tuned.store.results_file(other).unlink()
    with pytest.raises(ValueError, match=f"{other.name} has no results"):
        tuned.chosen("lora")


def test_gates_that_are_held_open_are_a_candidate_of_their_own(tuned):
    open_ = next(each for each in tuned.candidates("expert") if each.expert_dropout == 0)
    closed = next(each for each in tuned.candidates("expert") if (each.learning_rate, each.rank) == (2e-3, 32))
    for each in (open_, closed):
        for language in ("ro", "be", "ru"):
            wer = 0.02 if each == closed else 0.01
            tuned.store.write(replace(each, language=language), made_up_results(each, wer))
    assert tuned.chosen("expert") == {"learning_rate": 2e-3, "rank": 32, **grid.HELD_OPEN}
    finals = [each for each in tuned.finals("main") if each.method == "expert"]
    assert finals[:2] == [replace(each, language="ru") for each in (open_, closed)]
    # Noise that falls has learning rate and rank of these; gates that may close are a candidate that was not chosen.
    (may_close, noisy, *_) = tuned.runs("gates")
    assert (noisy.learning_rate, noisy.rank, noisy.gate_budget, noisy.expert_dropout) == (2e-3, 32, 0.75, 0.05)
    assert may_close in tuned.candidates("expert") and (may_close.rank, may_close.budget_weight) == (64, 0.1)


def test_the_distillation_is_chosen_in_validation(tuned):
    tried = tuned.taught_candidates()
    assert len(tried) == len(set(tried)) == 2 * len(grid.DISTILLATIONS)
    assert {each.fold for each in tried} == {0} and {each.language for each in tried} == {"ro", "be"}
    assert tuned.chosen_distillation() == {"kd_weight": 8.0, "kd_decay": False}
    for each in tried:
        if (each.kd_weight, each.kd_decay) == (8.0, True):
            tuned.store.write(each, made_up_results(each, 0.01))
    assert {(each.kd_weight, each.kd_decay) for each in tuned.runs("kd")} == {(8.0, True)}
    assert tuned.taught_tuning("main") == tuned.teachers("main") == []
    assert len([each for each in tuned.runs("kd") if each in tried]) == 2  # the chosen ones are not trained again


def test_full_experts_are_not_tuned_on_their_own_and_run_in_one_language(tuned, called, capsys):
    assert tuned.tuning("full-size") == []
    open_, papers, *_ = tuned.runs("full-size")
    assert [(each.method, each.learning_rate, each.rank) for each in (open_, papers)] == [
        ("full-expert", 2e-4, None),
        ("clsr", 2e-4, None),
    ]
    assert (open_.budget_weight, open_.gate_budget, open_.expert_dropout) == (1.0, 1.0, 0.0)
    assert (papers.straight_through, papers.gate_noise, papers.gate_budget, papers.skip_gate_prob) == (
        False,
        5,
        0.5,
        0.2,
    )
    for group, methods in (("full-size", 2), ("half", 3)):
        runs = tuned.runs(group)
        assert len(runs) == 3 * methods and {each.language for each in runs} == {"ru"}
    assert called("--groups", "full-size", "--languages", "ro") == []
    assert "full-size: nothing to run with these --methods and --languages" in capsys.readouterr().out


def test_runs_without_a_teacher_are_those_of_before(tuned):
    """Their names decide if they are trained again."""
    keys = {each.key for each in (*tuned.tuning("main"), *tuned.runs("main"))}
    assert "be_full_seed0_456a366d" in keys and "ro_zero-shot_seed0_43808d2d" in keys
    assert "ro_expert_seed0_f568503c" in keys and "ro_lora_seed0_a7b2a793" in keys


def test_a_fold_is_finished_before_the_next_and_gates_start_on_the_expert(tuned):
    runs = tuned.runs("main")
    assert [each.fold for each in runs] == sorted(each.fold for each in runs)
    assert [(each.language, each.method) for each in runs[:5]] == [
        ("ro", "zero-shot"),
        ("ro", "full"),
        ("ro", "lora"),
        ("ro", "expert"),
        ("be", "zero-shot"),
    ]
    assert len(runs) == len(set(runs)) == 4 * 3 * 3
    expert = runs[3]
    assert (expert.straight_through, expert.gate_noise, expert.gate_budget, expert.budget_weight) == (True, 0, 1, 0.1)


@pytest.fixture
def called(pretended):
    return pretended(run, "execute", lambda made: teacher_run(made.max_steps, made.fold))


FIRST = sum(2 * len(grid.CANDIDATES[name]) for name in ("full", "lora", "expert"))  # runs of main's tuning
TUNED = FIRST + 3 * grid.FINALISTS  # and those in one more language


def test_the_command_does_what_is_missing_teachers_before_those_they_teach(called, store):
    arguments = ("--groups", "main", "kd", "--languages", "ro", "--folds", 0, 2)
    done = called(*arguments)
    validated = [made for task, made in done if task == "validate"]
    executed = [made for task, made in done if task == "execute"]
    # Tuning, and that of the distillation; main and taught in two folds, and the teachers of these.
    assert len(validated) == len(set(validated)) == TUNED + 6
    assert len(executed) == len(set(executed)) == 8 + 2 + 2
    assert len(set(validated) & set(executed)) == 3 + 1  # the chosen ones are measured further
    teachers = [teacher_run(fold=0), teacher_run(fold=2)]
    assert [made for task, made in done if task == "train_alone"] == teachers
    assert executed[-2:] == teachers  # measured when those that they teach are there
    places = [made for _, made in done]
    assert places.index(teachers[1]) > max(places.index(made) for made in validated)
    assert called(*arguments) == []
    assert len(read_table(store.table_dir)) == TUNED + 6 + 12 - 4  # collected as they come

    # Weights are only on the machine that trained them.
    store.weights(teachers[1]).unlink()
    assert called(*arguments) == []
    assert called("--groups", "kd", "--languages", "be", "--folds", 2)[0] == ("train_alone", teachers[1])


def test_a_run_that_was_validated_elsewhere_is_trained_again_with_its_teacher(called, store):
    """A chosen run has no weights here, nor has its teacher."""
    arguments = ("--groups", "kd", "--languages", "ro", "--folds", 0)
    called(*arguments, "--budget_minutes", 0)
    done = called(*arguments)
    chosen = next(made for task, made in done if task == "execute" and made.teacher)
    store.write(chosen, validated_alone(made_up_results(chosen)))
    for made in (chosen, teacher_run(fold=0)):
        store.weights(made).unlink()
    assert called(*arguments) == [("train_alone", teacher_run(fold=0)), ("execute", chosen)]


def test_a_budget_starts_nothing_new_and_the_same_command_goes_on(called, capsys):
    arguments = ("--groups", "main", "--languages", "ro", "--folds", 0)
    assert called(*arguments, "--budget_minutes", 0) == []
    told = capsys.readouterr().out
    assert f"tuning: the time is over; {FIRST} runs are left. The same command goes on there." in told
    assert len(called(*arguments)) == TUNED + 4


def test_a_budget_ends_between_runs(monkeypatch):
    clock, done, called = [0.0], [], []
    monkeypatch.setattr(compare.time, "monotonic", lambda: clock[0])

    def task(made, setup):
        while len(called) < len(done) - 1:  # no run is two ahead of what has been heard of
            time.sleep(0.001)
        done.append(made.seed)
        clock[0] += 1.0
        return "done"

    with ThreadPoolExecutor(1) as pool:
        runs = [Run("full", "ro", seed=seed) for seed in range(1000)]
        assert compare.run_all(pool, task, runs, None, until=2.0, after=lambda: called.append(1)) == []
    assert 2 <= len(done) <= 4 and len(called) == len(done)


# -------------------------------------------------------------------------------------------------------- a run


@pytest.fixture
def setup(evidence_setup):
    return evidence_setup


def test_a_fold_is_read_from_its_folders(setup):
    def texts(split, fold):
        return read_split(setup, "ro", split, fold=fold)["transcription"][:]

    assert texts("test", 1) == [f"floare fold1 {place}" for place in range(4)]
    assert texts("validation", 1) == ["floare fold2 0", "floare fold2 1"]
    assert texts("train", 1) == ["floare fold2 2", "floare fold2 3", *(f"floare fold0 {place}" for place in range(4))]
    assert len(texts("out_of_domain", 1)) == 4


@pytest.mark.parametrize("name", ["zero-shot", "full", "lora", "expert", "full-expert"])
def test_a_run_is_trained_on_windows_and_measured_alone_joined_and_out_of_domain(name, setup):
    method = next(method for method in grid.METHODS if method.name == name)
    rank = 4 if name in ("lora", "expert") else None
    made = small(grid.Grid(setup.store).run(method, "ro", 1, {"learning_rate": 1e-2, "rank": rank}))
    execute(made, setup)
    result = setup.store.read(made)
    assert set(result["evaluations"]) == {"test", "joined", "out_of_domain"}  # nothing is chosen by it
    assert [len(result["evaluations"][split]["utterances"]) for split in ("test", "joined")] == [4, 1]
    words = {split: sum(row[3] for row in result["evaluations"][split]["utterances"]) for split in ("test", "joined")}
    assert words == {"test": 12, "joined": 12}
    assert result["others_untouched"] == (name in ("zero-shot", "expert", "full-expert"))
    assert result["gates"] == {}
    if name == "zero-shot":
        return
    assert result["train_utterances"] == 6 and result["train_steps"] >= 4
    weights = load_file(setup.store.weights(made))
    assert any("q_proj" in weight for weight in weights) == (name == "full")
    assert result["trained_parameters"] == sum(tensor.numel() for tensor in weights.values())


@pytest.mark.parametrize("name", ["full", "lora", "expert"])
def test_a_run_that_was_validated_is_measured_further_from_its_weights(name, setup, monkeypatch):
    method = next(method for method in grid.METHODS if method.name == name)
    tuned = {"learning_rate": 1e-2, "rank": None if name == "full" else 4}
    made, at_once = (small(grid.Grid(setup.store).run(method, "ro", 1, tuned), seed=seed) for seed in (0, 0))
    execute(at_once, setup)
    expected = setup.store.read(at_once)
    setup.store.results_file(at_once).unlink()

    validate(made, setup)
    validated = setup.store.read(made)
    assert set(validated["evaluations"]) == {"validation"} and "others_untouched" not in validated
    assert [len(evaluation["utterances"]) for evaluation in validated["evaluations"].values()] == [2]
    assert set(validated["gates"]) == ({"validation"} if name == "expert" else set())
    setup.store.collect({made: "tuning"})
    monkeypatch.setattr(experiment, "train", None)
    execute(made, setup)
    result = setup.store.read(made)
    assert result["evaluations"] == validated["evaluations"] | expected["evaluations"]
    for part in ("others_untouched", "train_steps", "settings"):
        assert result[part] == expected[part], part
    assert result["gates"] == validated["gates"] and result["seconds"] > validated["seconds"]


def test_a_run_that_was_stopped_while_it_was_measured_is_not_trained_again(setup, monkeypatch):
    made = small(grid.Grid(setup.store).run(grid.GROUPS["main"][2], "ro", 1, {"learning_rate": 1e-2, "rank": 4}))
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "measure", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            execute(made, setup)
    assert setup.store.read(made) is None
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "train", None)
        execute(made, setup)
    assert setup.store.read(made)["train_utterances"] == 6
    setup.store.results_file(made).unlink()  # to repeat a run, its results are removed
    monkeypatch.setattr(experiment, "train", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        execute(made, setup)


def test_a_run_that_lacks_its_weights_alone_is_trained_again_and_keeps_its_results(setup, monkeypatch):
    made = small(grid.Grid(setup.store).run(grid.GROUPS["main"][2], "ro", 1, {"learning_rate": 1e-2, "rank": 4}))
    execute(made, setup)
    result, weights = setup.store.read(made), setup.store.weights(made)
    trained = load_file(weights)
    weights.unlink()
    monkeypatch.setattr(experiment, "measure", lambda *args: 1 / 0)
    assert "trained" in execute(made, setup)
    assert setup.store.read(made) == result and not setup.store.trained_file(made).exists()
    again = load_file(weights)
    assert again.keys() == trained.keys() and all(again[name].allclose(trained[name], atol=1e-4) for name in trained)


@pytest.mark.parametrize("name", ["full", "lora", "expert"])
def test_half_of_a_run_is_measured_from_its_weights(name, setup, monkeypatch):
    made_of = grid.Grid(setup.store).run
    (whole, half) = (
        small(made_of(method, "ro", 1, {"learning_rate": 1e-2, "rank": None if name == "full" else 4}))
        for method in (
            next(method for method in grid.GROUPS[group] if method.name == name) for group in ("main", "half")
        )
    )
    assert half == replace(whole, scale=0.5) and half.key != whole.key
    execute(half, setup)  # trains the whole first
    assert setup.store.weights(whole).exists() and not setup.store.weights(half).exists()
    assert setup.store.read(whole) is None
    result = setup.store.read(half)
    assert result["settings"]["scale"] == 0.5 and result["train_steps"] >= 4
    assert result["others_untouched"] == (name == "expert")

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "train", None)
        execute(whole, setup)
        expected = {split: rates["utterances"] for split, rates in result["evaluations"].items()}
        setup.store.results_file(half).unlink()
        execute(half, setup)
        again = setup.store.read(half)["evaluations"]
        assert {split: rates["utterances"] for split, rates in again.items()} == expected
        models = {run.scale: experiment._loaded_or_trained(run, setup)[1] for run in (whole, half)}
    changed = [model.state_dict() for model in (experiment.build_model(whole, setup, 2.0), models[1], models[0.5])]
    if name == "lora":
        scaling = [module.scaling["default"] for module in models[0.5].modules() if hasattr(module, "lora_B")]
        assert set(scaling) == {0.5}
    else:
        pattern = "clsr_expert_B" if name == "expert" else "."
        moved = 0
        for key in filter(re.compile(pattern).search, changed[0]):
            start, all_, kept = (weights[key] for weights in changed)
            assert kept.allclose((start + all_) / 2, atol=1e-6), key
            moved += not start.equal(all_)
        assert moved


def test_a_teacher_of_a_fold_teaches_it_windows_of_each_epoch(setup, monkeypatch):
    teacher = teacher_run(fold=1)
    assert teacher.spec_augment and teacher.epochs > 4
    masked = []
    real = experiment.WhisperForConditionalGeneration.forward

    def forward(model, *args, **kwargs):
        masked.append(model.training and model.config.apply_spec_augment)
        return real(model, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(experiment.WhisperForConditionalGeneration, "forward", forward)
        monkeypatch.setattr(experiment, "teacher_run", lambda max_steps, fold: small(teacher_run(max_steps, fold)))
        execute(small(teacher), setup)
    assert any(masked)
    result = setup.store.read(small(teacher))
    assert result["train_utterances"] == 2 * 6
    assert set(result["evaluations"]) == {
        f"{language} {split}" for language in ("ro", "ca") for split in ("test", "joined", "out_of_domain")
    }
    tuned = {"learning_rate": 1e-2, "rank": 4, "kd_decay": True}
    made = small(grid.Grid(setup.store).run(grid.TAUGHT_EXPERTS, "ro", 1, tuned))
    execute(replace(made, epochs=15), setup)
    (first, *_) = setup.store.read(replace(made, epochs=15))["log"]
    assert first["kd_loss"] > 0


def test_the_weight_of_the_distillation_falls_to_nothing():
    class Arguments:
        kd_weight = 2.0

    class State:
        max_steps = 4

    arguments, weights = Arguments(), []
    for step in range(4):
        State.global_step = step
        KDDecay(2.0).on_step_begin(arguments, State, None)
        weights.append(arguments.kd_weight)
    assert weights == [2.0, 1.5, 1.0, 0.5]


# ----------------------------------------------------------------------------------------------------- the report


def random_counts(rate, sizes=(30, 30, 30), seed=0):
    generator = np.random.default_rng(seed)
    counts = {}
    for fold, size in enumerate(sizes):
        errors = generator.binomial(5, rate[fold] if isinstance(rate, list) else rate, size)
        counts[fold] = np.stack([errors, 0 * errors, 0 * errors, 0 * errors + 5, errors, 0 * errors + 20], axis=1)
    return counts


def width(counts, split="test"):
    low, high = np.quantile(estimates.rate(counts, "ro", split, "wer")[1:], [0.025, 0.975])
    return high - low


def test_a_rate_pools_the_folds_and_its_interval_covers_trainings_and_utterances():
    alike, unlike = random_counts(0.3), random_counts([0.1, 0.3, 0.5])
    pooled = np.concatenate(list(alike.values())).sum(axis=0)
    assert estimates.rate(alike, "ro", "test", "wer")[0] == pooled[0] / pooled[3]
    assert estimates.rate(alike, "ro", "test", "cer")[0] == pooled[4] / pooled[5]
    # By utterances alone it would be about 2 * 1.96 * sqrt(0.3 * 0.7 / 450) = 0.085.
    assert 0.05 < width(alike) < 0.15
    assert width(unlike) > 0.25  # the trainings differ
    assert width({fold: unlike[1] for fold in range(3)}, "out_of_domain") == pytest.approx(
        width({0: unlike[1]}, "out_of_domain"), rel=0.2
    )


def test_a_model_that_repeats_itself_has_at_most_all_words_wrong_in_the_bounded_rate():
    utterances = [[1, 0, 0, 5, 1, 20], [0, 0, 74, 5, 300, 20]]
    counts = {0: estimates.counts_of({"utterances": utterances})}
    assert estimates.rate(counts, "be", "test", "wer")[0] == 75 / 10
    assert estimates.rate(counts, "be", "test", "bounded")[0] == (1 + 5) / 10


def test_a_difference_is_paired_and_of_the_folds_that_both_have():
    counts = random_counts([0.1, 0.3, 0.5])
    worse = {fold: each + np.array([1, 0, 0, 0, 1, 0]) for fold, each in counts.items()}
    assert np.allclose(estimates.difference(worse, counts, "ro", "test", "wer"), 0.2)
    del worse[1]
    assert np.allclose(estimates.difference(worse, counts, "ro", "test", "wer"), 0.2)
    assert estimates.difference({}, counts, "ro", "test", "wer") is None
    with pytest.raises(ValueError, match="not measured on the same utterances of ro, fold 0, 'test'"):
        estimates.difference({0: counts[0][:5]}, counts, "ro", "test", "wer")


def test_the_report_names_what_is_missing_and_gives_the_same_files_again(tuned, tmp_path):
    store = tuned.store
    runs = [each for group in ("main", "kd") for each in tuned.runs(group)]
    left_out = next(each for each in runs if (each.method, each.language, each.fold) == ("full", "ru", 2))
    for each in [*runs, teacher_run(fold=0)]:
        if each != left_out:
            store.write(each, made_up_results(each, {"zero-shot": 0.9, "lora": 0.5, "expert": 0.4}.get(each.method)))
    every = {**dict.fromkeys([*runs, *tuned.taught_candidates()], "main"), teacher_run(fold=0): "teacher"}
    store.collect(every | dict.fromkeys(tuning_of(tuned, *grid.GROUPS), "tuning"))
    for folder in ("one", "two"):
        report.main(["--results_dir", str(store.results_dir), "--output_dir", str(tmp_path / folder)])
    names = ["second-round.json", "second-round.md", "second-round.png"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    numbers = json.loads((tmp_path / "one" / "second-round.json").read_text())
    assert numbers["rates"]["joined"]["experts"]["be"]["folds"] == [0, 1, 2]
    assert numbers["rates"]["test"]["full fine-tuning"]["ru"]["folds"] == [0, 1]
    both = numbers["both domains"]
    assert both["experts"]["wer to LoRA"]["value"] == pytest.approx(-0.1)
    assert both["experts"]["verdict of wer to LoRA"] == both["experts"]["verdict of bounded to LoRA"] == "better"
    assert both["LoRA"]["verdict of wer to full fine-tuning"].startswith("too")
    assert numbers["abilities"] == numbers["half"] == {}
    taught = numbers["taught"]["taught experts"]["ru"]
    assert taught["folds"] == [0, 1, 2] and taught["test"]["difference"]["value"] == pytest.approx(0)
    tables = (tmp_path / "one" / "second-round.md").read_text()
    assert "| experts | 40.0 (40.0) | 40.0 (40.0) | 40.0 (40.0) | 40.0 (40.0) | 40.0 [40.0, 40.0] |" in tables
    assert (
        "**experts, to LoRA: better**, -10.0 [-10.0, -10.0] points of WER. Bounded: better, -10.0 [-10.0, -10.0]."
        in tables
    )
    assert "| experts | 9 of 9 | 40.0 [40.0, 40.0] | -10.0 [-10.0, -10.0] | better |" in tables
    assert "**experts, to full fine-tuning: too early: 8 of 9 trainings**" in tables
    assert "**Russian, experts, to LoRA: better**, -10.0 [-10.0, -10.0] points of WER" in tables
    assert "**Russian, experts, to full fine-tuning: too early: 2 of 3 trainings**" in tables
    assert "## Russian: mean of both domains" in tables and numbers["ru"]["LoRA"]["trainings"] == 3
    assert "![Word errors by method, mean of both domains](second-round.png)" in tables
    assert "| taught experts | weight 8 | " in tables
    assert "full fine-tuning: ru 2;" in tables and "full experts: all" in tables
    assert "| experts | ro 3, be 3, ru 3 | 0.004, rank 32 | 0.0 M | 1.0 | 9 of 9 |" in tables
    assert "| LoRA | 0.004, rank 32 |" in tables and "| chosen, at the border |" in tables


@pytest.mark.parametrize(
    "low, high, trainings, expected",
    [
        (-0.2, -0.1, [3, 3], "better"),
        (0.1, 0.2, [3, 3], "worse"),
        (-0.1, 0.1, [3, 3], "level"),
        (-0.2, -0.1, [3, 2], "too early: 5 of 6 trainings"),
    ],
)
def test_a_difference_is_called_better_only_with_three_trainings_of_each_language(low, high, trainings, expected):
    assert report.verdict({"value": (low + high) / 2, "low": low, "high": high}, trainings) == expected
    assert report.verdict(None, trainings).startswith("too early")


def report_of(store, runs, tmp_path):
    """The page of runs alone, and its numbers."""
    store.collect(dict.fromkeys(runs, "main"))
    report.main(["--results_dir", str(store.results_dir), "--output_dir", str(tmp_path / "out")])
    text, numbers = ((tmp_path / "out" / f"second-round.{ending}").read_text() for ending in ("md", "json"))
    return text, json.loads(numbers)


def test_a_report_of_the_first_runs_has_means_over_the_languages_that_all_main_methods_have(tuned, tmp_path):
    for each in tuned.candidates("lora"):
        if (each.learning_rate, each.rank) == (2e-3, 32):
            tuned.store.write(each, made_up_results(each, 0.3))
    for each in tuned.finals("main"):
        if each.method == "lora" and each.learning_rate == 2e-3:
            tuned.store.write(each, validated_alone(made_up_results(each, 0.3)))
    tried = tuning_of(tuned, *grid.GROUPS)
    first = tuned.runs("main")[:6]  # Romanian, and two methods of Belarusian; tuning has both of fold 0
    for each in first:
        tuned.store.write(each, made_up_results(each, 0.3))
    text, numbers = report_of(tuned.store, [*tried, *first], tmp_path)
    assert "**Not complete: 10 of 78 runs are there.**" in text and "taught experts: tuning" in text
    assert "| LoRA | 0.002, rank 32 | 30.0 | 30.0 | 30.0 | chosen |" in text
    assert numbers["both domains"]["LoRA"]["trainings"] == 2
    assert numbers["rates"]["test"]["experts"].keys() == {"ro", "be", "mean"}
    assert "too early: 2 of 9 trainings" in text and "better" not in re.sub("is better", "", text)
    assert "Russian: mean" not in text and numbers["ru"] == {}
    assert (tmp_path / "out" / "second-round.png").exists()


def test_a_report_names_runs_in_float32_among_those_in_bfloat16(tuned, tmp_path):
    runs = tuned.runs("main")
    for each in runs:
        result = made_up_results(each)
        result["settings"]["precision"] = "float32" if (each.method, each.fold) == ("lora", 2) else "bfloat16"
        tuned.store.write(each, result)
    text, _ = report_of(tuned.store, [*runs, *tuning_of(tuned, *grid.GROUPS)], tmp_path)
    assert "In float32, as their CPU had no bfloat16 instructions: LoRA ro 2, LoRA be 2, LoRA ru 2. All" in text


def test_a_report_of_tuning_alone_has_no_figure(tuned, tmp_path):
    tried = tuned.candidates("full")
    for each in tried:
        tuned.store.write(each, validated_alone(made_up_results(each)))
    text, _ = report_of(tuned.store, tried, tmp_path)
    assert "**Not complete: 0 of 78 runs are there.**" in text and "No experts are there yet" in text
    assert "| full fine-tuning | 1e-05 | 99.9 | 99.9 | - |  |" in text
    assert "whisper, unchanged: all; full fine-tuning: tuning; LoRA: tuning" in text
    assert not (tmp_path / "out" / "second-round.png").exists()


def test_the_figure_names_methods_and_marks_those_that_lack_trainings(tuned, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "draw", lambda points, unchanged, title, path: drawn.append((points, unchanged)))
    runs = tuned.runs("main")
    for each in runs[:-1]:
        tuned.store.write(each, made_up_results(each, 0.9 if each.method == "zero-shot" else 0.5))
    report_of(tuned.store, [*runs[:-1], *tuning_of(tuned, "main", "kd")], tmp_path)
    ((points, unchanged),) = drawn
    assert unchanged == pytest.approx(90)
    names = [(point["label"], point["has_experts"]) for point in points]
    assert names == [("full fine-tuning", False), ("LoRA", False), ("experts (8 of 9 trainings)", True)]


def test_half_of_a_training_is_compared_with_all_of_it(tuned, tmp_path):
    runs = [*tuned.runs("main"), *tuned.runs("half")]
    for each in runs:
        if each.scale == 1 or each.language == "ru":
            wer = 0.45 if each.method == "lora" else 0.4
            tuned.store.write(each, made_up_results(each, 0.5 if each.scale == 1 else wer))
    text, numbers = report_of(tuned.store, [*runs, *tuning_of(tuned, "main")], tmp_path)
    assert numbers["half"].keys() == {"full fine-tuning, half", "LoRA, half", "experts, half"}
    cells = numbers["half"]["experts, half"]
    assert cells.keys() == {"ru"} and cells["ru"]["folds"] == [0, 1, 2]
    assert cells["ru"]["both domains"]["difference"]["value"] == pytest.approx(-0.1)
    cell = "50.0 → 40.0: -10.0 [-10.0, -10.0]"
    assert f"| experts, half | Russian 0, 1, 2 | {cell} | {cell} | {cell} | {cell} | {cell} |" in text
    assert "experts, half" not in numbers["both domains"] and "experts, half:" not in text  # Russian alone
    others = {label: cells["ru"]["both domains"]["difference"]["value"] for label, cells in numbers["halves"].items()}
    assert others == pytest.approx({"full fine-tuning, half": 0, "LoRA, half": 0.05})  # to half of experts
    assert "| LoRA, half | Russian 0, 1, 2 | 40.0 → 45.0: +5.0 [+5.0, +5.0] |" in text


def test_gates_that_choose_are_compared_with_those_held_open(tuned, tmp_path):
    runs = [*tuned.runs("main"), *tuned.runs("gates")]
    wers = {("ru", 0): 0.6, ("ru", 1): 0.6, ("ro", 2): 0.8}  # of noise that falls
    for each in runs:
        if each.rank != 64:
            wer = wers.get((each.language, each.fold)) if each.method == "straight" else 0.5
            if wer is not None:
                tuned.store.write(each, made_up_results(each, wer))
    text, numbers = report_of(tuned.store, [*runs, *tuning_of(tuned, "main")], tmp_path)
    cells = numbers["gates"]["experts, noise that falls"]
    assert {language: cell.get("folds") for language, cell in cells.items()} == {"ru": [0, 1], "ro": [2], "mean": None}
    for column in ("test", "both domains", "both domains, bounded"):
        values = {language: cell[column]["difference"]["value"] for language, cell in cells.items()}
        assert values == pytest.approx({"ru": 0.1, "ro": 0.3, "mean": 0.2})
    assert re.search(r"\| experts, noise that falls \| Russian 0, 1 \| 50.0 → 60.0: \+10.0 ", text)
    assert re.search(r"\| experts, noise that falls \| mean \| 50.0 → 70.0: \+20.0 ", text)


def test_full_experts_are_compared_with_low_rank_and_the_papers_gates_with_those_held_open(tuned, tmp_path):
    wers = {"expert": 0.5, "full-expert": 0.6, "clsr": 0.8}
    runs = [each for group in ("main", "full-size") for each in tuned.runs(group) if each.language == "ru"]
    for each in runs:
        tuned.store.write(each, made_up_results(each, wers.get(each.method, 0.9)))
    text, numbers = report_of(tuned.store, [*runs, *tuning_of(tuned, "main")], tmp_path)
    differences = {label: cells["ru"]["test"]["difference"]["value"] for label, cells in numbers["sizes"].items()}
    assert differences == pytest.approx({"full experts": 0.1, "full experts, the paper's gates": 0.2})
    assert "| full experts, the paper's gates | Russian 0, 1, 2 | 60.0 → 80.0: +20.0 " in text


def test_abilities_are_tabled_with_intervals_and_differences_to_the_unchanged_model(tuned, tmp_path):
    runs = [each for each in tuned.runs("main") if each.method in ("zero-shot", "lora", "expert")]
    table, statistics = AbilityTable(tuned.store), [[10, 10, 5] * 6]
    for each in runs:
        tuned.store.write(each, made_up_results(each))
        expert, wrong = each.method == "expert", int(each.method == "lora")
        abilities = {
            "other": {"language": "ca", "identical": True if expert else None, "utterances": [[wrong, 0, 0, 4, 0, 9]]},
            "translation": statistics,
            "times": [0.1, None],
            "seconds": 1.0,
        }
        table.write(each, abilities | ({"shared_decoder": [[10, 10, 10] * 6]} if expert else {}))
    table.collect(runs)
    text, numbers = report_of(tuned.store, [*runs, *tuning_of(tuned, "main")], tmp_path)
    assert "## Untouched ability" in text
    lora, experts = (numbers["abilities"][label]["mean"] for label in ("LoRA", "experts"))
    assert lora["other_wer to unchanged"] == {"value": 0.25, "low": 0.25, "high": 0.25}
    assert experts["shared_decoder to unchanged"]["value"] == pytest.approx(0.5)  # to its translation
    assert experts["translation to unchanged"]["value"] == 0
    assert numbers["abilities"]["experts"]["ro"]["median_time_error"] is None
    assert re.search(r"\| experts \| ro \| 3 \| 0.0 .*\| 50.0 .*\| 100.0 .*\| 50.0 .*\| 3 of 3 \|", text)


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no results of methods: python -m benchmarks.evidence.run makes them"):
        report.main(["--results_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
