"""The abilities that trainings changed: the scores, the measurement, the command, and its files."""

import csv
import json

import numpy as np
import pytest
import sacrebleu
from evidence_runs import made_up_results, small, write_tuning
from sacrebleu.metrics import CHRF

from benchmarks.comparison.experiment import execute
from benchmarks.comparison.runs import teacher_run
from benchmarks.comparison.store import ResultStore
from benchmarks.evidence import abilities, ability_table, grid, steps
from benchmarks.evidence.ability_table import AbilityTable, chrf, key_of, on_time, scores
from peft_clsr.evaluation import times

# ----------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("texts", [["A horse.", "", "two ducks"], ["", "", ""], ["A red flower.", "A duck.", "a"]])
def test_chrf_is_that_of_sacrebleu(texts):
    references = ["A red flower.", "A duck.", "a"]
    statistics = np.array(CHRF()._extract_corpus_statistics(texts, [references]))
    expected = sacrebleu.corpus_chrf(texts, [references]).score
    assert 100 * chrf(statistics.sum(axis=0)) == pytest.approx(expected)
    assert 100 * chrf(np.stack([statistics.sum(axis=0)] * 2)) == pytest.approx([expected] * 2)


def made_up_abilities(wrong=1, identical=None, missed=(0.1, 0.6, None)):
    utterance = [wrong, 0, 0, 4, wrong, 20]
    statistics = CHRF()._extract_corpus_statistics(["a duck", "a cow"], [["a duck", "a horse"]])
    made = {
        "other": {"language": "ca", "identical": identical, "utterances": [utterance] * 2},
        "translation": statistics,
        "times": [*missed],
        "seconds": 2.0,
    }
    return made | ({} if identical is None else {"shared_decoder": statistics[:1]})


def test_scores_follow_from_what_was_measured():
    assert times.NEAR == ability_table.NEAR
    assert on_time([0.5, 0.51, None]).tolist() == [[1, 1], [0, 1], [0, 1]]
    found = scores(made_up_abilities(identical=True))
    assert (found["other_wer"], found["other_identical"], found["shared_decoder_chrf"]) == (0.25, True, 1)
    assert (found["on_time"], found["median_time_error"]) == (pytest.approx(1 / 3), 0.6)
    assert 0 < found["translation_chrf"] < 1
    without = scores(made_up_abilities(missed=(None, None, 0.1)))
    assert without["median_time_error"] is None and "shared_decoder_chrf" not in without


# ------------------------------------------------------------------------------------------------------ measurement


@pytest.mark.parametrize("name", ["zero-shot", "lora", "expert"])
def test_a_run_is_measured_in_another_language_as_a_translator_and_in_time(name, evidence_setup, monkeypatch):
    store = evidence_setup.store
    monkeypatch.setattr(abilities, "MAX_NEW_TOKENS_OF_LONG", 8)
    method = next(method for method in grid.METHODS if method.name == name)
    tuned = {} if name == "zero-shot" else {"learning_rate": 1e-2, "rank": 4}
    run = small(grid.Grid(store).run(method, "ro", 1, tuned))
    execute(run, evidence_setup)
    store.weights(run).unlink(missing_ok=True)  # it is trained again

    heard, real = [], abilities.transcribe

    def transcribe(model, processor, rows, language, **settings):
        config = getattr(model, "peft_config", {}).get("ro")
        heard.append((language, settings.get("task"), getattr(config, "translate_with_shared_decoder", None)))
        return real(model, processor, rows, language, **settings)

    monkeypatch.setattr(abilities, "transcribe", transcribe)
    known = store.results_file(run).read_bytes()
    said = abilities.measure_abilities(run, evidence_setup)
    assert "abilities measured" in said and ("trained again" in said) == (name != "zero-shot")
    assert store.results_file(run).read_bytes() == known
    measured = json.loads(AbilityTable(store).file(run).read_text())
    is_expert = name == "expert"
    routed = False if is_expert else None
    expected = [("ca", None, routed), ("ro", "translate", routed)]
    assert heard == expected + [("ro", "translate", True)] * is_expert
    assert measured["other"]["language"] == "ca" and measured["other"]["identical"] is (True if is_expert else None)
    assert sum(row[3] for row in measured["other"]["utterances"]) == 12
    assert np.array(measured["translation"]).shape == (4, 18)
    assert ("shared_decoder" in measured) == is_expert
    assert len(measured["times"]) == 4 and all(error is None or error >= 0 for error in measured["times"])
    assert set(scores(measured)) >= {"other_wer", "translation_chrf", "on_time"}


def test_an_expert_that_is_not_routed_by_language_is_noticed(evidence_setup):
    from benchmarks.comparison.experiment import is_untouched, load_run, load_split

    method = next(method for method in grid.METHODS if method.label == "experts")
    run = small(grid.Grid(evidence_setup.store).run(method, "ro", 1, {"learning_rate": 1e-1, "rank": 4}))
    execute(run, evidence_setup)
    _, model, processor = load_run(run, evidence_setup, run.audio_seconds)
    rows = load_split(evidence_setup, "ca", "test", processor, fold=1)
    assert is_untouched(evidence_setup, model, rows, "ca")
    model.base_model.route_by_language = False
    assert not is_untouched(evidence_setup, model, rows, "ca")


def test_the_other_language_is_not_the_trained_one():
    assert [abilities.other_language(language) for language in ("ro", "ru", "ca")] == ["ca", "ca", "ro"]


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def store(tmp_path):
    return ResultStore(tmp_path / "results", tmp_path / "work", "whisper-base")


@pytest.fixture
def called(command, store, tmp_path, monkeypatch):
    """Calls the command, but nothing is measured. Returns the runs that would be, in order."""
    measured = []

    def measure(run, setup):
        measured.append(run)
        AbilityTable(setup.store).write(run, made_up_abilities(identical=True if run.method == "expert" else None))
        return run.name

    monkeypatch.setattr(abilities, "measure_abilities", measure)
    (tmp_path / "data" / "ca").mkdir(parents=True)
    return command(abilities, measured)


def finish(store, group, folds):
    """Writes results of the Romanian runs of a group. Returns the runs."""
    made = grid.Grid(store, ["ro"], folds)
    write_tuning(made)
    runs = made.runs(group)
    for run in runs:
        store.write(run, made_up_results(run))
    return runs


@pytest.fixture
def finished(store):
    """Romanian runs of the group main in fold 0, with results."""
    return finish(store, "main", [0])


def test_finished_runs_are_measured_once_and_the_others_named(called, finished, store, capsys):
    lora = next(run for run in finished if run.method == "lora")
    assert called("--languages", "ro", "--methods", "lora") == [lora]
    assert called("--languages", "ro") == [run for run in finished if run != lora]
    assert "left out: ro_zero-shot_seed0_fold=1 has no results yet" in capsys.readouterr().out
    assert called("--languages", "ro") == []

    with open(store.table_dir / "abilities.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["other_identical"], row["fold"]) for row in rows] == [
        ("expert", "true", "0"),
        ("full", "", "0"),
        ("lora", "", "0"),
        ("zero-shot", "", "0"),
    ]
    assert set(AbilityTable(store).read()) == {key_of(run) for run in finished}
    assert not list(store.work_dir.rglob("abilities.json"))


def test_teachers_of_runs_without_weights_are_trained_first(called, store, monkeypatch):
    taught = finish(store, "kd", range(3))
    store.weights(taught[0]).touch()
    trained = []

    def train(run, setup):
        trained.append(run)
        store.weights(run).parent.mkdir(parents=True, exist_ok=True)
        store.weights(run).touch()
        return run.name

    monkeypatch.setattr(steps, "train_alone", train)
    assert called("--languages", "ro", "--groups", "kd") == taught
    assert trained == [teacher_run(fold=1), teacher_run(fold=2)]


def test_what_is_not_tuned_is_named(called, store, capsys):
    assert called("--languages", "ro", "--folds", 0) == []
    assert "left out: LoRA, which is not tuned yet" in capsys.readouterr().out


def test_a_budget_measures_nothing_more_and_the_same_command_goes_on(called, finished, store, capsys):
    assert called("--languages", "ro", "--budget_minutes", 0) == []
    assert "the time is over; 4 runs are left. The same command goes on there." in capsys.readouterr().out
    AbilityTable(store).write(finished[0], made_up_abilities())  # of a command that was stopped
    assert finished[0] not in called("--languages", "ro")


def test_recordings_in_the_other_language_are_asked_for_before_anything_is_measured(called, capsys):
    with pytest.raises(SystemExit):
        called("--languages", "ca")
    assert "has no recordings in 'ro': python -m benchmarks.evidence.speech --languages ro" in capsys.readouterr().err


def test_the_same_abilities_give_the_same_files(finished, store):
    table, files = AbilityTable(store), []
    for runs in (finished[:2], finished[1::-1]):
        for run in runs:
            table.write(run, made_up_abilities())
        table.collect(runs)
        files.append([(store.table_dir / name).read_bytes() for name in ("abilities.csv", "abilities.jsonl.gz")])
    assert files[0] == files[1]
