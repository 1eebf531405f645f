"""Experts of few recordings: what student and teacher are trained on, the order of runs, and the tables."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from evidence_runs import made_up_evaluation, made_up_results, small, tuning_of, validated_alone, write_tuning
from transformers import WhisperProcessor

from benchmarks.comparison import experiment
from benchmarks.comparison.experiment import execute, load_split, read_split, train_alone, validate
from benchmarks.comparison.methods import HELD_OUT
from benchmarks.comparison.runs import Run, held_out_teacher
from benchmarks.comparison.store import ResultStore
from benchmarks.evidence import few, few_runs, grid, report, teacher_table, teachers


@pytest.fixture
def tuned(tmp_path):
    made = grid.Grid(ResultStore(tmp_path / "results", tmp_path / "work", "whisper-base"))
    write_tuning(made)
    return made


# ------------------------------------------------------------------------------------------------------- recordings


def test_student_and_teacher_are_trained_on_parts_of_the_fold(tuned):
    student = few_runs.taught(tuned, "ru", 1, 2.0)
    made = few_runs.teacher_run(tuned, "ru", 1)
    assert made == held_out_teacher(student)
    assert (student.train_size, student.train_from, made.train_size, made.train_from) == (100, 0, None, 100)
    assert student.epochs == 2 * made.epochs == 8
    assert few_runs.untaught(tuned, "ru", 1) == replace(student, teacher=None)
    with pytest.raises(ValueError, match="so none are left for its teacher: set train_size"):
        held_out_teacher(Run("expert", "ru", fold=1, train_size=None))


@pytest.fixture
def student(evidence_setup, monkeypatch):
    """Two recordings, of the six of a fold's training."""
    monkeypatch.setattr(experiment, "held_out_teacher", lambda run: small(held_out_teacher(run)))
    tuned = {"learning_rate": 1e-2, "rank": 4, "train_size": 2, "teacher": HELD_OUT}
    return small(grid.Grid(evidence_setup.store).run(grid.Method("expert", ""), "ro", 1, tuned))


def test_the_teacher_of_other_recordings_teaches(student, evidence_setup):
    setup, teacher = evidence_setup, experiment.held_out_teacher(student)
    theirs, its = (
        set(read_split(setup, "ro", "train", run.train_size, 1, run.train_from)["audio"][:])
        for run in (student, teacher)
    )
    everything = read_split(setup, "ro", "train", fold=1)["audio"][:]
    assert not theirs & its and theirs | its == set(everything) and (len(theirs), len(its)) == (2, 4)
    train_alone(teacher, setup)
    execute(student, setup, ("test",))
    execute(teacher, setup, ("test",))
    results = [setup.store.read(run) for run in (student, teacher)]
    assert [each["train_utterances"] for each in results] == [2, 4]
    assert [set(each["evaluations"]) for each in results] == [{"test"}] * 2
    assert results[0]["others_untouched"] and not results[1]["others_untouched"]

    loaded, _ = experiment.load_teacher(student, setup)
    base, _ = experiment.load_teacher(replace(student, teacher="base"), setup)
    name = "model.decoder.layers.0.fc1.weight"
    assert not loaded.state_dict()[name].equal(base.state_dict()[name])


def test_a_validated_run_that_is_trained_again_keeps_a_validation(student, evidence_setup):
    run = replace(student, teacher=None)
    validate(run, evidence_setup)
    evidence_setup.store.weights(run).unlink()
    execute(run, evidence_setup, ("test",))
    assert set(evidence_setup.store.read(run)["evaluations"]) == {"validation", "test"}


@pytest.mark.parametrize("wrong", [0, 3])
def test_tokens_that_a_teacher_predicts_are_those_of_the_text(evidence_setup, monkeypatch, wrong):
    """A teacher that predicts each label, but the first `wrong` of each text."""
    monkeypatch.setattr(teachers, "BATCH", 3)
    processor = WhisperProcessor.from_pretrained(evidence_setup.student)
    rows = load_split(evidence_setup, "ro", "test", processor, fold=1)
    texts = [processor.tokenizer(" " + text, add_special_tokens=False).input_ids for text in rows["text"]]

    class Teacher(torch.nn.Module):
        dtype = torch.float32

        def forward(self, input_features, labels):
            logits = torch.nn.functional.one_hot(labels.clamp(min=0), len(processor.tokenizer)).float()
            start = int((labels[0] == texts[0][0]).nonzero()[0])
            logits[:, start : start + wrong] = 0
            return SimpleNamespace(logits=logits)

    counts = teachers.known_tokens(Teacher(), processor, rows)
    tokens = sum(map(len, texts))
    assert len(texts) == 4 and counts == {"tokens": tokens, "predicted": tokens - 4 * wrong}


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def called(pretended, tuned):
    return pretended(few, "measure", held_out_teacher)


def test_the_command_trains_teachers_first_chooses_the_weight_and_measures_each_run_once(called, tuned):
    done = called("--folds", 0, 2)
    languages = ["ro", "ru"]
    assert done[:2] == [("train_alone", few_runs.teacher_run(tuned, language, 0)) for language in languages]
    validated = [made for task, made in done if task == "validate"]
    assert [(made.teacher and made.kd_weight, made.language) for made in validated] == [
        (weight, language) for weight in (None, 2.0, 8.0, 32.0, 128.0) for language in languages
    ]
    assert few_runs.chosen_weight(tuned) == 128.0  # `made_up_results` has it so
    measured = [made for task, made in done if task == "measure"]
    assert measured == [
        run for make in (few_runs.student_runs, few_runs.teacher_runs) for fold in (0, 2) for run in make(tuned, fold)
    ]
    assert {made.kd_weight for made in measured if made.teacher} == {128.0}
    places = [made for _, made in done]
    assert places.index(few_runs.teacher_run(tuned, "ru", 2)) < places.index(few_runs.taught(tuned, "ro", 2))
    assert called("--folds", 0, 2) == []


def test_a_run_that_was_validated_elsewhere_needs_its_teacher_again(called, tuned):
    called("--folds", 0)
    chosen, teacher = few_runs.taught(tuned, "ro", 0), few_runs.teacher_run(tuned, "ro", 0)
    tuned.store.write(chosen, validated_alone(made_up_results(chosen)))
    for made in (chosen, teacher):
        tuned.store.weights(made).unlink()
    assert called("--folds", 0) == [("train_alone", teacher), ("measure", chosen)]


def test_a_budget_starts_nothing(called, tuned, capsys):
    assert called("--budget_minutes", 0) == []
    assert "teaching: the time is over; 2 runs are left. The same command goes on there." in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no results in .* run benchmarks.evidence.few again"):
        few_runs.chosen_weight(tuned)


def test_russian_has_announcements_too(monkeypatch):
    asked = []
    monkeypatch.setattr(few, "execute", lambda run, setup, splits: asked.append((run.language, splits)))
    for language in ("ro", "ru"):
        few.measure(Run("expert", language), None)
    assert asked == [("ro", ("test",)), ("ru", ("test", "out_of_domain"))]


# -------------------------------------------------------------------------------------------------------- the tables


def validation_of(tuned, *weights):
    """Results of the runs that choose the weight."""
    runs = [run for weight, some in few_runs.tuning(tuned).items() for run in some if weight in (None, *weights)]
    for run in runs:
        tuned.store.write(run, validated_alone(made_up_results(run, 0.3)))
    return runs


def measured(run, wer):
    """Results that leave validation, and so the choice, as `validation_of` has it."""
    result = made_up_results(run, wer)
    result["evaluations"]["validation"] = made_up_evaluation(0.3)
    return result


def page_of(tuned, runs, tmp_path):
    """The page of runs, and its numbers."""
    tuned.store.collect(dict.fromkeys([*runs, *tuning_of(tuned, *grid.GROUPS)], "few"))
    report.main(["--results_dir", str(tuned.store.results_dir), "--output_dir", str(tmp_path / "out")])
    text, numbers = ((tmp_path / "out" / f"second-round.{ending}").read_text() for ending in ("md", "json"))
    return text, json.loads(numbers)["few"]


def test_the_page_compares_the_folds_that_both_have(tuned, tmp_path):
    runs = validation_of(tuned, *few_runs.KD_WEIGHTS)
    for make, wer in {few_runs.untaught: 0.5, few_runs.taught: 0.4, few_runs.teacher_run: 0.2}.items():
        for language, fold in (("ro", 0), ("ro", 1), ("ru", 0)):
            if (make, fold) != (few_runs.teacher_run, 1):
                runs.append(make(tuned, language, fold))
                tuned.store.write(runs[-1], measured(runs[-1], wer))
    for split, predicted in (("train", 99), ("test", 80)):
        keys = {"teacher": "finetuned", "language": "ro", "fold": 0, "split": split}
        teacher_table.results_of(tuned.store).add(keys | {"tokens": 100, "predicted": predicted})
    text, numbers = page_of(tuned, runs, tmp_path)
    cell = "50.0 → 40.0: -10.0 [-10.0, -10.0]"
    assert f"| taught experts | ro 0, 1; ru 0 | {' | '.join([cell] * 5)} |" in text
    assert "| their teacher | ro 0; ru 0 | 50.0 → 20.0: -30.0 [-30.0, -30.0] |" in text
    assert "| of the grid, trained on what it teaches | 99.0 | 80.0 | - | - | 0 |" in text
    assert "| weight 2 | 30.0 | 30.0 | 30.0 | bfloat16 | chosen, at the border |" in text  # of equal ones the first
    assert numbers["their teacher"]["out_of_domain"]["difference"]["value"] == pytest.approx(-0.3)
    assert numbers["taught experts"]["folds"] == {"ro": [0, 1], "ru": [0]}


def test_students_are_compared_before_their_teachers_are_measured(tuned, tmp_path):
    runs = validation_of(tuned, *few_runs.KD_WEIGHTS)
    for language in ("ro", "ru"):
        runs += [make(tuned, language, 0) for make in (few_runs.untaught, few_runs.taught)]
    for run in runs[-4:]:
        tuned.store.write(run, measured(run, 0.5))
    text, numbers = page_of(tuned, runs, tmp_path)
    assert numbers.keys() == {"taught experts"} and "| their teacher |" not in text


def test_the_page_has_the_weights_that_were_tried(tuned, tmp_path):
    assert "other recordings" not in page_of(tuned, [], tmp_path)[0]
    text, numbers = page_of(tuned, validation_of(tuned, 2.0), tmp_path)
    assert "| without a teacher | 30.0 | 30.0 | 30.0 | bfloat16 |  |" in text
    assert "| weight 2 | 30.0 | 30.0 | 30.0 | bfloat16 |  |" in text
    assert "weight 32" not in text and numbers == {}
