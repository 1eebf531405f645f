"""Experts of few recordings: what student and teacher are trained on, the order of runs, and the tables."""

import json
from dataclasses import replace

import pytest
from evidence_runs import made_up_results, small, tuning_of, validated_alone, write_tuning

from benchmarks.comparison import experiment
from benchmarks.comparison.experiment import execute, load_split, read_split, train_alone
from benchmarks.comparison.methods import HELD_OUT
from benchmarks.comparison.runs import Run, held_out_teacher
from benchmarks.comparison.store import ResultStore
from benchmarks.evidence import few, grid, report, teachers


@pytest.fixture
def tuned(tmp_path):
    made = grid.Grid(ResultStore(tmp_path / "results", tmp_path / "work", "whisper-base"))
    write_tuning(made)
    return made


# ------------------------------------------------------------------------------------------------------- recordings


def test_student_and_teacher_share_no_recording(tuned):
    student = few.taught(tuned, "ru", 1, 2.0)
    made = few.teacher(tuned, "ru", 1)
    assert made == held_out_teacher(student)
    assert (student.train_size, student.train_from, made.train_size, made.train_from) == (100, 0, None, 100)
    assert student.epochs == 2 * made.epochs == 8
    assert few.untaught(tuned, "ru", 1) == replace(student, teacher=None)
    with pytest.raises(ValueError, match="so none are left for its teacher: set train_size"):
        held_out_teacher(Run("expert", "ru", fold=1, train_size=None))


def test_the_teacher_of_other_recordings_teaches(evidence_setup, monkeypatch):
    setup = evidence_setup
    monkeypatch.setattr(experiment, "held_out_teacher", lambda run: small(held_out_teacher(run)))
    tuned = {"learning_rate": 1e-2, "rank": 4, "train_size": 2, "teacher": HELD_OUT}
    student = small(grid.Grid(setup.store).run(grid.Method("expert", ""), "ro", 1, tuned))
    teacher = experiment.held_out_teacher(student)
    assert read_split(setup, "ro", "train", None, 1, teacher.train_from)["transcription"][:] == [
        f"floare fold0 {place}" for place in range(4)
    ]
    train_alone(teacher, setup)
    execute(student, setup, ("test",))
    execute(teacher, setup, ("test",))
    results = [setup.store.read(run) for run in (student, teacher)]
    assert [each["train_utterances"] for each in results] == [2, 4]
    assert [set(each["evaluations"]) for each in results] == [{"test"}] * 2
    assert results[0]["others_untouched"] and not results[1]["others_untouched"]

    loaded, processor = experiment.load_teacher(student, setup)
    base, _ = experiment.load_teacher(replace(student, teacher="base"), setup)
    name = "model.decoder.layers.0.fc1.weight"
    assert not loaded.state_dict()[name].equal(base.state_dict()[name])

    rows = load_split(setup, "ro", "test", processor, fold=1)
    counts = teachers.known_tokens(loaded.eval(), processor, rows)
    texts = [processor.tokenizer(" " + text, add_special_tokens=False).input_ids for text in rows["text"]]
    assert counts["tokens"] == sum(map(len, texts))
    assert 0 <= counts["predicted"] <= counts["tokens"]


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def called(pretended, tuned):
    return pretended(few, "measure", held_out_teacher)


def test_the_command_trains_teachers_first_chooses_the_weight_and_measures_each_run_once(called, tuned):
    done = called("--folds", 0, 2)
    languages = ["ro", "ru"]
    assert done[:2] == [("train_alone", few.teacher(tuned, language, 0)) for language in languages]
    validated = [made for task, made in done if task == "validate"]
    assert [(made.teacher and made.kd_weight, made.language) for made in validated] == [
        (weight, language) for weight in (None, 2.0, 8.0, 32.0, 128.0) for language in languages
    ]
    assert few.chosen_weight(tuned) == 128.0  # `made_up_results` has it so
    measured = [made for task, made in done if task == "measure"]
    assert measured == [run for make in (few.students, few.teachers) for fold in (0, 2) for run in make(tuned, fold)]
    assert {made.kd_weight for made in measured if made.teacher} == {128.0}
    places = [made for _, made in done]
    assert places.index(few.teacher(tuned, "ru", 2)) < places.index(few.taught(tuned, "ro", 2))
    assert called("--folds", 0, 2) == []


def test_a_run_that_was_validated_elsewhere_needs_its_teacher_again(called, tuned):
    called("--folds", 0)
    chosen, teacher = few.taught(tuned, "ro", 0), few.teacher(tuned, "ro", 0)
    tuned.store.write(chosen, validated_alone(made_up_results(chosen)))
    for made in (chosen, teacher):
        tuned.store.weights(made).unlink()
    assert called("--folds", 0) == [("train_alone", teacher), ("measure", chosen)]


def test_a_budget_starts_nothing(called, tuned, capsys):
    assert called("--budget_minutes", 0) == []
    assert "tuning: the time is over; 10 runs are left. The same command goes on there." in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no results in .* run benchmarks.evidence.few again"):
        few.chosen_weight(tuned)


def test_russian_has_announcements_too(monkeypatch):
    asked = []
    monkeypatch.setattr(few, "execute", lambda run, setup, splits: asked.append((run.language, splits)))
    for language in ("ro", "ru"):
        few.measure(Run("expert", language), None)
    assert asked == [("ro", ("test",)), ("ru", ("test", "out_of_domain"))]


# -------------------------------------------------------------------------------------------------------- the tables


def test_the_page_compares_the_folds_that_all_three_have(tuned, tmp_path):
    store, runs = tuned.store, [run for some in few.tuning(tuned).values() for run in some]
    for run in runs:
        store.write(run, validated_alone(made_up_results(run)))
    rates = {few.untaught: 0.5, few.taught: 0.4, few.teacher: 0.2}
    for make, wer in rates.items():
        for language, fold in (("ro", 0), ("ro", 1), ("ru", 0)):
            if (make, fold) != (few.teacher, 1):
                runs.append(make(tuned, language, fold))
                store.write(runs[-1], made_up_results(runs[-1], wer))
    store.collect(dict.fromkeys([*runs, *tuning_of(tuned, *grid.GROUPS)], "few"))
    for split, predicted in (("train", 99), ("test", 80)):
        keys = {"teacher": "finetuned", "language": "ro", "fold": 0, "split": split}
        teachers.results_of(store).add(keys | {"tokens": 100, "predicted": predicted})

    report.main(["--results_dir", str(store.results_dir), "--output_dir", str(tmp_path / "out")])
    text = (tmp_path / "out" / "second-round.md").read_text()
    assert "Folds: Romanian 0; Russian 0." in text
    assert "| taught experts | 40.0 | 40.0 | 40.0 | 40.0 | 40.0 |" in text
    assert "| taught experts, to experts | -10.0 [-10.0, -10.0] | -10.0 [-10.0, -10.0] |" in text
    assert "| their teacher, to experts | -30.0 [-30.0, -30.0] |" in text
    assert "| weight 128 |" in text and "| without a teacher |" in text
    assert "| of the grid, trained on what it teaches | 99.0 | 80.0 | - | - | 0 |" in text
    numbers = json.loads((tmp_path / "out" / "second-round.json").read_text())["few"]
    assert numbers["folds"] == {"ro": [0], "ru": [0]}
    assert numbers["their teacher"]["out_of_domain"]["to experts"]["value"] == pytest.approx(-0.3)


def test_the_page_has_the_weights_that_were_tried(tuned, tmp_path):
    def page(runs):
        tuned.store.collect(dict.fromkeys([*runs, *tuning_of(tuned, *grid.GROUPS)], "tuning"))
        report.main(["--results_dir", str(tuned.store.results_dir), "--output_dir", str(tmp_path / "out")])
        return (tmp_path / "out" / "second-round.md").read_text()

    assert "other recordings" not in page([])
    runs = [run for weight, some in few.tuning(tuned).items() for run in some if weight in (None, 2.0)]
    for run in runs:
        tuned.store.write(run, validated_alone(made_up_results(run, 0.3)))
    text = page(runs)
    assert "| without a teacher | 30.0 | 30.0 | 30.0 |  |" in text and "| weight 2 | 30.0 | 30.0 | 30.0 |  |" in text
    assert "weight 32" not in text and "Folds:" not in text
