"""The comparison: which runs there are, and what each trains and measures, on a tiny random Whisper and noise."""

import csv
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import SPECIAL_TOKENS, build_tokenizer
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor
from transformers.utils import logging

from benchmarks.comparison import compare, experiment, gates, grid, methods, selection
from benchmarks.comparison.errors import evaluation_of
from benchmarks.comparison.experiment import Setup, execute, measure_untouched
from benchmarks.comparison.runs import Run, run_name, settings_hash, teacher_run
from benchmarks.comparison.store import ResultStore, decode, load, read_table, write_table
from peft_clsr import (
    DataCollatorSpeechSeq2SeqWithPadding,
    error_rates,
    set_audio_context,
    transcribe,
)

ROOT = Path(__file__).parents[2]
TEXTS = {"ro": "o floare", "bg": "котка", "el": "γάτα", "be": "кот", "ca": "un gat", "en": "a cat", "es": "un gato"}
SPLIT_SIZES = {"train": 4, "validation": 2, "test": 3, "out_of_domain": 2}
FULL_SECONDS, SHORT_SECONDS = 2.0, 1.0  # of context in these tests; in place of 30 s and 3 s
HIGH = {"learning_rate": 1e-2, "max_steps": 50}  # a loss is logged every 25 steps


# ------------------------------------------------------------------------------------------------------- the grid


@pytest.fixture
def empty_store(tmp_path):
    return ResultStore(tmp_path / "results", tmp_path / "work", "student")


def made_up_evaluation(wer):
    errors = round(1e6 * wer)
    return evaluation_of([[errors, 0, 0, 1_000_000, errors, 1_000_000]])


def made_up_results(run, student="student"):
    """WER falls with the learning rate, and is the same for all ranks; in the test split it rises."""
    wer = 1 / (1 + 1000 * (run.learning_rate or 0))
    evaluations = {"validation": made_up_evaluation(wer), "test": made_up_evaluation(1 - wer)}
    settings = asdict(run) | {"student": student}
    return {"settings": settings, "machine": {}, "evaluations": evaluations, "gates": {}}


@pytest.fixture
def tuned_grid(empty_store):
    """A grid of two languages and seeds whose tuning is done, in one language that is not of the grid."""
    made = grid.Grid(empty_store, "finetuned", ["ro", "ca"], [0, 1], max_steps=-1)
    for run in made.runs("tuning"):
        empty_store.write(run, made_up_results(run))
    return made


def write_validation(store, runs, rates):
    """Makes the WER in validation that of `rates`, by language, learning rate and rank; 1 of those not named."""
    for run in runs:
        results = made_up_results(run)
        rate = rates.get((run.language, run.learning_rate, run.rank), 1.0)
        results["evaluations"]["validation"] = made_up_evaluation(rate)
        store.write(run, results)


def test_a_name_tells_every_setting():
    run = Run("low-rank", "ro", teacher="finetuned", learning_rate=2e-3, rank=64)
    assert run.name == "ro_low-rank_kd-finetuned_seed0_learning_rate=0.002_rank=64"
    assert Run("zero-shot", "ca", audio_seconds=30.0).name == "ca_zero-shot_seed0_audio_seconds=30"
    others = {
        "method": "clsr",
        "language": "ca",
        "seed": 1,
        "teacher": "org/whisper-small",
        "learning_rate": 1e-3,
        "rank": 32,
        "epochs": 4,
        "kd_loss": "kl",
        "straight_through": True,
        "decoder_layers": 3,
    }
    names = {run.name, replace(run, teacher=None).name, replace(run, teacher="other/whisper-small").name}
    for field in fields(Run):
        value = others.get(field.name, None)
        if value is None:
            value = getattr(run, field.name) + 1
        names.add(replace(run, **{field.name: value}).name)
    assert len(names) == len(fields(Run)) + 3
    assert not any("/" in name for name in names)


def test_a_name_leaves_out_what_is_of_the_method_itself():
    run = Run("straight", "ro", learning_rate=1e-3, rank=64, **methods.METHOD_SETTINGS["straight"])
    assert run.name == "ro_straight_seed0_learning_rate=0.001_rank=64"
    assert replace(run, gate_budget=0.5, gate_noise=0.0).name == f"{run.name}_gate_budget=0.5_gate_noise=0"
    assert replace(run, skip_gate_prob=0.2).name == f"{run.name}_skip_gate_prob=0.2"
    assert replace(run, method="low-rank").name == (
        "ro_low-rank_seed0_learning_rate=0.001_rank=64"
        "_gate_budget=0.75_skip_gate_prob=0_expert_dropout=0.05_straight_through=True"
    )


def test_results_of_another_student_are_kept_apart(empty_store):
    run = Run("lora", "ro")
    other = replace(empty_store, student="whisper-small")
    assert empty_store.read(run) is None
    empty_store.write(run, made_up_results(run))
    assert empty_store.read(run) == made_up_results(run)
    assert other.read(run) is None
    empty_store.collect({run: "main"})
    assert empty_store.read(run) == made_up_results(run)
    assert other.read(run) is None and other.weights(run) != empty_store.weights(run)


def test_tuning_tries_the_candidates_of_each_method_in_two_languages():
    made = grid.Grid(None, "base", ["ca"], [1, 2], max_steps=7)
    runs = made.runs("tuning")
    tried = Counter((run.method, run.teacher) for run in runs if run.language == "ro")
    assert tried == Counter((run.method, run.teacher) for run in runs if run.language == "bg")
    assert tried == {
        ("full", None): 3,
        ("lora", None): 6,
        ("clsr", None): 3,
        ("clsr", "base"): 3,
        ("low-rank", "base"): 3,
        ("straight", None): 3,
        ("straight", "base"): 3,
    }
    assert {(run.language, run.seed, run.max_steps) for run in runs} == {("ro", 0, 7), ("bg", 0, 7)}
    assert len({run.name for run in runs}) == len(runs) == 2 * 24
    settings = {
        (run.method, run.straight_through, run.gate_budget, run.skip_gate_prob, run.expert_dropout)
        for run in runs
        if run.rank is not None and run.method != "lora"
    }
    assert settings == {("low-rank", False, 0.5, 0.2, 0.3), ("straight", True, 0.75, 0.0, 0.05)}


def test_the_tuned_run_is_the_candidate_of_the_lowest_validation_wer_as_in_the_report(tuned_grid):
    expected = {"full": (1e-4, None), "clsr": (5e-4, None)}
    expected |= {method: (4e-3, 64) for method in ("lora", "low-rank", "straight")}
    tuned_grid.store.collect(dict.fromkeys(tuned_grid.runs("tuning"), "tuning"))
    results = load(tuned_grid.store.results_dir)
    for method, teacher in tuned_grid.methods:
        run = tuned_grid.tuned(method, teacher)
        assert (run.learning_rate, run.rank) == expected[method] == selection.chosen(results, method, teacher)
        assert (run.language, run.seed, run.teacher) == ("ro", 0, teacher)


@pytest.mark.parametrize(
    "rates, expected",
    [
        # The best in Romanian, the best in Bulgarian, and that of the lowest mean.
        (
            {
                ("ro", 5e-4, 64): 0.1,
                ("ro", 2e-3, 64): 0.2,
                ("bg", 2e-3, 64): 0.8,
                ("ro", 2e-3, 32): 0.9,
                ("bg", 2e-3, 32): 0.3,
            },
            (2e-3, 64),
        ),
        # Equal ones, of which the last candidate's file is the first by name.
        ({(language, 1e-3, rank): 0.25 for language in ("ro", "bg") for rank in (32, 64)}, (1e-3, 64)),
        ({}, (5e-4, 64)),
    ],
    ids=["mean", "equal", "all equal"],
)
def test_the_lowest_mean_over_both_languages_is_chosen_of_equal_ones_the_first_as_in_the_report(
    rates, expected, tuned_grid
):
    write_validation(tuned_grid.store, tuned_grid.tuning("lora", None), rates)
    run = tuned_grid.tuned("lora", None)
    assert (run.language, run.learning_rate, run.rank) == ("ro", *expected)
    tuned_grid.store.collect(dict.fromkeys(tuned_grid.runs("tuning"), "tuning"))
    results = load(tuned_grid.store.results_dir)
    assert selection.chosen(results, "lora") == expected
    assert {
        selection.tuning(result) for result in selection.main_grid(results) if selection.method_of(result)[0] == "lora"
    } == {expected}


def test_a_missing_tuning_run_is_named(tuned_grid):
    run = Run("lora", "bg", learning_rate=1e-3, rank=32)
    tuned_grid.store.results_file(run).unlink()
    with pytest.raises(ValueError, match=f"{run.name} has no results in .*: run the group 'tuning' first"):
        tuned_grid.runs("main")


def test_main_has_every_method_language_and_seed_as_tuned(tuned_grid):
    runs = tuned_grid.runs("main")
    cells = {(run.language, run.seed, run.method, run.teacher) for run in runs if run.method != "zero-shot"}
    pairs = [("ro", 0), ("ro", 1), ("ca", 0), ("ca", 1)]
    assert cells == {(*pair, *method) for pair in pairs for method in tuned_grid.methods}
    assert {run.rank for run in runs if run.method == "lora"} == {64}
    zero_shot = [(run.language, run.audio_seconds, run.seed) for run in runs if run.method == "zero-shot"]
    assert zero_shot == [("ro", 30.0, 0), ("ro", 3.0, 0), ("ca", 30.0, 0), ("ca", 3.0, 0)]
    assert len(runs) == len(set(runs)) == 4 + 7 * 2 * 2
    assert {tuned_grid.tuned(*method) for method in tuned_grid.methods} <= set(runs)  # not trained anew


def test_other_groups_change_one_thing_in_romanian(tuned_grid):
    main = tuned_grid.runs("main")
    for group, changes in grid.CHANGES.items():
        best = tuned_grid.tuned("straight", None if group == "rank" else "finetuned")
        assert tuned_grid.runs(group) == [
            replace(best, **change, seed=seed) for seed in (0, 1) for change in changes
        ], group
        assert best.language == "ro" and best in main and not set(tuned_grid.runs(group)) & set(main), group
    assert {run.rank for run in tuned_grid.runs("rank")} == {8, 32, None}
    assert [run.teacher for run in tuned_grid.runs("kd")] == 2 * ["base", "finetuned", "finetuned", "finetuned"]

    size = Counter((run.train_size, run.method, run.teacher) for run in tuned_grid.runs("size"))
    methods = [("lora", None), ("clsr", "finetuned"), ("straight", "finetuned")]
    assert size == {(size, *method): 2 for size in (100, 200) for method in methods}
    student = [(run.decoder_layers, run.method, run.teacher) for run in tuned_grid.runs("student") if run.seed == 0]
    assert student == [
        (3, "full", None),
        (3, "lora", None),
        (3, "straight", None),
        (3, "straight", "finetuned"),
    ]


def test_runs_of_main_in_romanian_are_measured_afterwards(tuned_grid):
    untouched, routed = (tuned_grid.measured_again(group) for group in ("untouched", "gates"))
    assert set(untouched) | set(routed) <= {run for run in tuned_grid.runs("main") if run.language == "ro"}
    assert len(untouched) == 1 + 7 * 2 and untouched[0].method == "zero-shot"
    methods = [("clsr", None), ("straight", None)]
    methods += [(method, "finetuned") for method in ("clsr", "low-rank", "straight")]
    assert [(run.method, run.teacher) for run in routed] == 2 * methods


def test_a_student_of_fewer_layers_has_each_method_as_tuned(tuned_grid):
    best = {(language, 1e-3, 64): 0.0 for language in ("ro", "bg")}
    write_validation(tuned_grid.store, tuned_grid.tuning("straight", None), best)
    runs = {run.teacher: run for run in tuned_grid.runs("student") if run.method == "straight"}
    assert {teacher: run.learning_rate for teacher, run in runs.items()} == {None: 1e-3, "finetuned": 4e-3}


def test_a_failed_run_stops_no_other_and_is_named_at_the_end(capsys):
    runs = [Run("full", "ro", seed=seed) for seed in range(3)]
    done = []

    setup = object()

    def task(run, given):
        assert given is setup
        done.append(run)
        if run.seed == 1:
            raise OSError("disk full")
        return f"seed {run.seed} done"

    with ThreadPoolExecutor(1) as pool:
        failed = compare.run_all(pool, task, [*runs, runs[0]], setup)
    with pytest.raises(RuntimeError, match="1 runs failed.*: ro_full_seed1$"):
        compare.check(failed)
    compare.check([])
    assert done == runs  # each once
    printed = capsys.readouterr()
    assert "/3] seed 2 done" in printed.out and "/3] ro_full_seed1: failed" in printed.out
    assert "OSError: disk full" in printed.err


@pytest.fixture
def call_main(tmp_path, monkeypatch):
    """Runs compare.py's `main` with the given arguments."""
    for name in ("OMP_NUM_THREADS", "TQDM_DISABLE"):  # `main` sets them
        monkeypatch.setenv(name, "1")
    folders = [f"--{name}_dir={tmp_path / name}" for name in ("data", "results", "work")]

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare.py", *folders, *map(str, arguments)])
        compare.main()

    return call


@pytest.fixture
def trial_store(tmp_path):
    """The results of `pretended`."""
    return ResultStore(tmp_path / "results", tmp_path / "work", "whisper-base")


def remove_rows(store, *runs):
    table = dict(read_table(store.table_dir))
    for run in runs:
        del table[run.language, run.method, run.seed, settings_hash(asdict(run))]
    write_table(store.table_dir, table.values())


@pytest.fixture
def pretended(call_main, monkeypatch, tmp_path):
    """
    `call_main`, but nothing is trained; returns the runs that were executed, and group and run of what was measured
    afterwards, in this order.
    """
    executed, measured = [], []

    def execute(run, setup):
        assert run.teacher != "finetuned" or setup.store.weights(teacher_run(run.max_steps)).exists()
        executed.append(run)
        if run.method != "zero-shot":
            path = setup.store.weights(run)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        setup.store.write(run, made_up_results(run, setup.store.student))
        return run.name

    def measuring(group, key):
        def measure(run, setup):
            measured.append((group, run))
            setup.store.write(run, setup.store.read(run) | {key: {}})
            return run.name

        return measure, key

    monkeypatch.setattr(compare, "execute", execute)
    for group, (_, key) in compare.MEASURED_AGAIN.items():
        monkeypatch.setitem(compare.MEASURED_AGAIN, group, measuring(group, key))
    monkeypatch.setattr(compare, "ProcessPoolExecutor", lambda jobs, **settings: ThreadPoolExecutor(jobs))
    (tmp_path / "data").mkdir()

    def call(*arguments):
        executed.clear(), measured.clear()
        call_main(*arguments)
        return list(executed), list(measured)

    return call


def test_runs_that_were_trained_elsewhere_are_not_measured_again(pretended, trial_store, capsys):
    arguments = ("--groups", "tuning", "main", "gates", "--languages", "ro", "--seeds", 0)
    _, measured = pretended(*arguments)
    assert len(measured) == 5
    for _, run in measured:
        result = trial_store.read(run)
        del result["without_gates"]
        trial_store.write(run, result)
    trial_store.weights(measured[0][1]).unlink()
    assert pretended(*arguments) == ([], measured[1:])
    assert "gates: left out 1 runs: their weights are not in" in capsys.readouterr().out


def test_the_whole_grid_is_run_once_the_teacher_before_whom_it_teaches(pretended, trial_store):
    arguments = ("--languages", "ro", "ca", "--seeds", 0, 1)
    executed, measured = pretended(*arguments)
    assert executed[0] == teacher_run()
    # Teacher; tuning; main without the 7 runs that are tuning's; gate, budget, kd, rank; size; student.
    assert len(executed) == len(set(executed)) == 1 + 48 + (32 - 7) + 2 * (3 + 4 + 4 + 5) + 12 + 8
    assert Counter(group for group, _ in measured) == {"untouched": 15, "gates": 10}
    assert pretended(*arguments) == ([], [])

    removed = Run("clsr", "ca", seed=1, teacher="finetuned", learning_rate=5e-4)
    remove_rows(trial_store, removed)
    assert pretended(*arguments) == ([removed], [])


def test_a_teacher_is_trained_only_where_a_missing_run_needs_it(pretended, trial_store, tmp_path):
    arguments = ("--groups", "tuning", "main", "--languages", "ro", "--seeds", 0)
    pretended(*arguments)
    alone = Run("lora", "ro", learning_rate=4e-3, rank=64)
    taught = Run("clsr", "ro", teacher="finetuned", learning_rate=5e-4)

    # A fresh clone has results, and no weights.
    shutil.rmtree(tmp_path / "work")
    assert pretended(*arguments) == ([], [])
    remove_rows(trial_store, alone)
    assert pretended(*arguments) == ([alone], [])
    remove_rows(trial_store, taught)
    assert pretended(*arguments) == ([teacher_run(), taught], [])
    # Weights without results are of a teacher that was stopped.
    remove_rows(trial_store, taught, teacher_run())
    assert pretended(*arguments) == ([teacher_run(), taught], [])


def test_another_student_has_a_grid_of_its_own(pretended, tmp_path):
    arguments = ("--groups", "tuning", "--teacher", "base")
    first, _ = pretended(*arguments)
    second, _ = pretended(*arguments, "--student", "openai/whisper-small")
    assert set(first) == set(second)
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"whisper-base", "whisper-small"}


def test_a_teacher_that_is_given_is_not_trained(pretended):
    executed, measured = pretended("--groups", "tuning", "--teacher", "base")
    assert len(executed) == 48 and not measured
    assert {run.teacher for run in executed} == {None, "base"}


def test_a_trial_does_not_mix_with_results(tmp_path, monkeypatch, capsys):
    for arguments in (["--max_steps", "2"], ["--max_utterances", "4", "--results_dir", str(tmp_path)]):
        monkeypatch.setattr(sys, "argv", ["compare.py", f"--data_dir={tmp_path}", *arguments])
        with pytest.raises(SystemExit):
            compare.main()
        assert "for a trial: give it a --" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["comparison", "evidence"])
def test_a_report_needs_no_torch(part):
    command = (
        f"import sys, benchmarks.{part}.report; "
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# ----------------------------------------------------------------------------------------------------- a run


@pytest.fixture
def seconds():
    return FULL_SECONDS


@pytest.fixture
def tiny_processor(seconds):
    """With a token for Spanish."""
    tokenizer = build_tokenizer((*SPECIAL_TOKENS, "<|es|>"))
    return WhisperProcessor(WhisperFeatureExtractor(chunk_length=int(seconds)), tokenizer)


@pytest.fixture
def setup(tiny_whisper, tiny_processor, seconds, tmp_path, monkeypatch):
    """A student whose full context is `seconds`, and noise of a second and less as `speech.py` lays it out."""
    model = tiny_whisper(init_std=0.5, max_source_positions=int(50 * seconds), max_target_positions=80)
    model.generation_config.lang_to_id["<|es|>"] = tiny_processor.tokenizer.convert_tokens_to_ids("<|es|>")
    model.save_pretrained(tmp_path / "student")
    tiny_processor.save_pretrained(tmp_path / "student")
    generator = np.random.default_rng(0)
    for language, text in TEXTS.items():
        for split in SPLIT_SIZES if language not in ("en", "es") else ["test"]:
            folder = tmp_path / "data" / language / split
            folder.mkdir(parents=True)
            with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
                table = csv.writer(file)
                table.writerow(["file_name", "transcription", "language", "translation"])
                for i in range(SPLIT_SIZES[split]):
                    soundfile.write(folder / f"{i}.wav", generator.normal(0, 0.1, 6000 + 3000 * i), 16000)
                    table.writerow([f"{i}.wav", f"{text} {'abcd'[i]}.", language, f"It is {'abcd'[i]}."])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # of processes that are spawned
    monkeypatch.setattr(experiment, "FULL_CONTEXT", FULL_SECONDS)
    for module in (experiment, gates):
        monkeypatch.setattr(module, "MAX_NEW_TOKENS", 12)
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    store = ResultStore(tmp_path / "results", tmp_path / "work", "student")
    yield Setup(str(tmp_path / "student"), tmp_path / "data", store, "float32", 1, None)
    # What `execute` changes of its process.
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)
    datasets.enable_progress_bars()


@pytest.fixture
def said(monkeypatch):
    """All transcripts of a test: (language, task, transcripts, references)."""
    heard, transcribe = [], experiment.transcribe

    def record(model, processor, dataset, language, task="transcribe", **settings):
        transcripts = transcribe(model, processor, dataset, language, task=task, **settings)
        heard.append((language, task, transcripts, list(dataset["text"])))
        return transcripts

    monkeypatch.setattr(experiment, "transcribe", record)
    return heard


def write_teacher(setup, tiny_whisper, max_steps=-1):
    """What the run on all languages would leave: the weights of another Whisper. Returns them."""
    other = tiny_whisper(
        seed=1, init_std=0.5, max_source_positions=int(50 * FULL_SECONDS), max_target_positions=80
    ).state_dict()
    weights = {name: tensor.clone() for name, tensor in other.items() if name != "proj_out.weight"}
    path = setup.store.weights(teacher_run(max_steps))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)
    return weights


@pytest.mark.parametrize(
    "run",
    [
        Run("full", "ro", audio_seconds=FULL_SECONDS, **HIGH),
        Run("lora", "ro", audio_seconds=FULL_SECONDS, rank=4, **HIGH),
        Run("clsr", "ro", audio_seconds=FULL_SECONDS, **HIGH),
        Run("low-rank", "ro", teacher="finetuned", audio_seconds=FULL_SECONDS, rank=4, decoder_layers=1, **HIGH),
    ],
    ids=lambda run: run.method,
)
def test_a_run_is_trained_measured_and_measured_again_from_its_weights(run, setup, said, tiny_whisper):
    routed = run.method in ("clsr", "low-rank")
    base = Run("zero-shot", "ro", audio_seconds=FULL_SECONDS, decoder_layers=run.decoder_layers)
    if run.teacher is not None:
        write_teacher(setup, tiny_whisper, run.max_steps)
    execute(base, setup)
    measure_untouched(base, setup)
    said.clear()
    assert execute(run, setup).startswith(f"{run.name}: WER validation ")
    before, after = setup.store.read(base), setup.store.read(run)

    # The numbers are those of the transcripts.
    splits = ("validation", "test", "out_of_domain")
    assert set(after["evaluations"]) == set(splits)
    for (language, _, heard, references), split in zip(said, splits, strict=True):
        rates = after["evaluations"][split]
        expected = error_rates(heard, references, language=language)[language]
        assert len(rates["utterances"]) == SPLIT_SIZES[split]
        totals = np.sum(rates["utterances"], axis=0)
        assert rates["wer"] == pytest.approx(expected["wer"]) == totals[:3].sum() / totals[3]
        assert rates["cer"] == pytest.approx(expected["cer"]) == totals[4] / totals[5]
    assert after["settings"] == asdict(run) | {"student": "student", "precision": "float32"}

    # The training.
    assert (after["train_utterances"], after["train_steps"], len(after["log"])) == (4, 50, 2)
    losses = [entry[name] for entry in after["log"] for name in entry if name.endswith("loss")]
    assert len(losses) == (8 if routed else 2) and all(map(math.isfinite, losses))
    assert after["log"][1]["loss"] < after["log"][0]["loss"]
    if routed:
        assert all((entry["kd_loss"] > 0) == (run.teacher is not None) for entry in after["log"])
    assert "log" not in before and before["gates"] == {}

    # What was trained.
    weights = load_file(setup.store.weights(run))
    assert after["trained_parameters"] == sum(tensor.numel() for tensor in weights.values())
    if run.method == "full":
        assert "model.decoder.embed_tokens.weight" in weights
        assert "model.encoder.embed_positions.weight" not in weights
    elif run.method == "lora":  # rank 4, on projections of 16 to 32 and 32 to 16 in 4 layers
        assert all(name.split(".")[-4] in ("fc1", "fc2") and "lora_" in name for name in weights)
        assert after["trained_parameters"] == 4 * 2 * 4 * (16 + 32)
    else:
        assert all("clsr_" in name for name in weights)

    # The gates.
    layers = [("encoder", 0), ("encoder", 1), ("decoder", 0)] + [("decoder", 1)] * (run.decoder_layers is None)
    modules = {f"model.{side}.layers.{layer}.fc1" for side, layer in layers}
    assert set(after["gates"]) == (set(after["evaluations"]) if routed else set())
    for shares in after["gates"].values():
        assert set(shares) == modules and all(0 <= share <= 1 for share in shares.values())

    # Loaded again: its own language as it was trained, the others as they were where the expert is not theirs.
    measure_untouched(run, setup)
    assert set(before["untouched"]) == {"en", "es", "translate-es", "ro at 30 s", "translate-ro"}
    assert {key: value for key, value in setup.store.read(run).items() if key != "untouched"} == after
    before, after = before["untouched"], setup.store.read(run)["untouched"]
    assert after["ro at 30 s"] == setup.store.read(run)["evaluations"]["test"] != before["ro at 30 s"]
    for key in ("en", "es", "translate-es"):
        assert (after[key] == before[key]) == routed, key


def test_the_teacher_run_trains_on_all_languages_and_is_measured_in_each(setup):
    run = teacher_run(max_steps=2)
    execute(run, setup)
    results = setup.store.read(run)
    assert results["train_utterances"] == 5 * 4
    assert set(results["evaluations"]) == {
        f"{language} {split}"
        for language in ("ro", "bg", "el", "be", "ca")
        for split in ("validation", "test", "out_of_domain")
    }
    assert len(results["evaluations"]["el test"]["utterances"]) == 3
    taught = Run("clsr", "ro", teacher="finetuned", audio_seconds=SHORT_SECONDS, max_steps=2)
    teacher, _ = experiment.load_teacher(taught, setup)
    student = WhisperForConditionalGeneration.from_pretrained(setup.student)
    trained = load_file(setup.store.weights(run))
    assert torch.equal(teacher.model.encoder.conv1.weight, trained["model.encoder.conv1.weight"])
    assert not torch.equal(teacher.model.encoder.conv1.weight, student.model.encoder.conv1.weight)
    assert torch.equal(teacher.proj_out.weight, trained["model.decoder.embed_tokens.weight"])  # which are tied


def test_a_finetuned_teacher_hears_what_the_student_does_and_others_the_full_context(setup, tiny_whisper):
    weights = write_teacher(setup, tiny_whisper)
    run = Run("clsr", "ro", audio_seconds=SHORT_SECONDS)
    assert experiment.load_teacher(run, setup) == (None, None)
    seen = {}
    for name in ("finetuned", "base", setup.student):
        teacher, processor = experiment.load_teacher(replace(run, teacher=name), replace(setup, precision="bfloat16"))
        assert teacher.dtype == torch.bfloat16
        is_other = torch.equal(teacher.model.encoder.conv1.weight, weights["model.encoder.conv1.weight"].bfloat16())
        seen[name] = (is_other, teacher.config.max_source_positions, processor.feature_extractor.n_samples)
    assert seen == {"finetuned": (True, 50, 16000), "base": (False, 100, 32000), setup.student: (False, 100, 32000)}


def test_a_student_at_a_short_context_is_taught_by_its_base_at_the_full_one(setup):
    run = Run("low-rank", "ro", teacher="base", learning_rate=1e-2, rank=4, max_steps=25, audio_seconds=SHORT_SECONDS)
    execute(run, setup)
    (entry,) = setup.store.read(run)["log"]
    assert entry["loss"] == pytest.approx(entry["ce_loss"] + 2.0 * entry["kd_loss"] + entry["budget_loss"], rel=1e-3)
    assert entry["kd_loss"] > 0.05


@pytest.mark.parametrize("method", ["full", "lora"])
def test_label_smoothing_reaches_methods_that_transformers_trains(method, setup):
    smoothing = 0.1
    run = Run(method, "ro", learning_rate=0.0, rank=4, max_steps=25, audio_seconds=SHORT_SECONDS)
    execute(replace(run, label_smoothing=smoothing), setup)
    (entry,) = setup.store.read(run)["log"]

    processor = WhisperProcessor.from_pretrained(setup.student)
    model = WhisperForConditionalGeneration.from_pretrained(setup.student)
    set_audio_context(model, processor, SHORT_SECONDS)
    examples = experiment.load_split(setup, "ro", "train", processor)
    batch = DataCollatorSpeechSeq2SeqWithPadding(processor)(list(examples))
    with torch.no_grad():
        logits = model(input_features=batch["input_features"], labels=batch["labels"]).logits
    kept = batch["labels"] != -100
    log_probabilities = logits[kept].log_softmax(-1)
    plain = F.nll_loss(log_probabilities, batch["labels"][kept]).item()
    smoothed = (1 - smoothing) * plain - smoothing * log_probabilities.mean().item()
    assert abs(smoothed - plain) > 0.01
    assert entry["loss"] == pytest.approx(smoothed, rel=1e-4)


def test_errors_are_counted_by_kind_and_utterance():
    references = ["O floare, mică.", "Un gat", "нет"]
    predictions = ["o floare mica", "un un gat negre", ""]
    counts = experiment.count_errors(predictions, references, "ro")
    assert counts["utterances"] == [[1, 0, 0, 3, 1, 13], [0, 0, 2, 2, 9, 6], [0, 1, 0, 1, 3, 3]]
    expected = error_rates(predictions, references, language="all")["all"]
    assert counts["wer"] == expected["wer"] == 4 / 6
    assert counts["cer"] == expected["cer"] == 13 / 22


def test_a_split_is_the_first_utterances_and_all_of_them_must_fit(setup):
    processor = WhisperProcessor.from_pretrained(setup.student)
    load = experiment.load_split
    assert load(setup, "ro", "train", processor)["text"][:] == [f"o floare {letter}." for letter in "abcd"]
    assert load(setup, "ro", "train", processor, 3)["translation"][:] == ["It is a.", "It is b.", "It is c."]
    assert len(load(replace(setup, max_utterances=2), "ro", "train", processor, 3)) == 2
    soundfile.write(setup.data_dir / "ro" / "test" / "1.wav", np.zeros(40000), 16000)
    with pytest.raises(ValueError, match="1 utterances of .*test cannot be used"):
        load(setup, "ro", "test", processor)


@pytest.mark.parametrize("measure", [measure_untouched, gates.measure_gates])
def test_only_a_run_that_is_there_is_measured_again(measure, setup):
    run = Run("clsr", "ro", learning_rate=1e-2)
    with pytest.raises(ValueError, match=f"{run.name} has no results in .*: run the group 'main' first"):
        measure(run, setup)
    setup.store.write(run, made_up_results(run))
    with pytest.raises(ValueError, match=f"{setup.store.weights(run)} is missing: to train its run again, remove"):
        measure(run, setup)
    save_file({"model.fc1.clsr_gate": torch.zeros(1)}, setup.store.weights(run))
    with pytest.raises(ValueError, match="is of another model"):
        measure(run, setup)


@pytest.fixture
def routed_run(setup):
    """A run of low-rank experts whose weights are by chance, so that gates and experts matter; and its model."""
    run = Run("low-rank", "ro", rank=4, audio_seconds=SHORT_SECONDS)
    model = experiment.build_model(run, setup, SHORT_SECONDS)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.7, generator=generator)
    experiment.save_weights(model, setup.store.weights(run))
    processor = WhisperProcessor.from_pretrained(setup.student)
    set_audio_context(None, processor, SHORT_SECONDS)
    splits = ["validation", "test", "out_of_domain"]
    evaluations, shares = experiment.measure(run, setup, model, processor, splits)
    setup.store.write(run, made_up_results(run) | {"evaluations": evaluations, "gates": shares})
    return run, model, processor


def test_measured_without_its_gates_a_run_takes_the_expert_or_either_path_by_chance(routed_run, setup):
    run, model, processor = routed_run
    before = setup.store.read(run)
    gates.measure_gates(run, setup)
    results = setup.store.read(run)
    assert {key: value for key, value in results.items() if key not in ("gate_logits", "without_gates")} == before
    assert list(results["without_gates"]) == ["all to the expert", "half at random"]

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "clsr_gate_out" in name:
                parameter.zero_()  # a gate logit of 0 is one for the expert
    for split in ("test", "out_of_domain"):
        dataset = experiment.load_split(setup, "ro", split, processor)
        heard = transcribe(model, processor, dataset, "ro", max_new_tokens=12)
        at_random = results["without_gates"]["half at random"][split]
        expected = experiment.count_errors(heard, dataset["text"], "ro")
        assert results["without_gates"]["all to the expert"][split] == expected
        assert expected not in (before["evaluations"][split], at_random) and at_random != before["evaluations"][split]

    gates.measure_gates(run, setup)
    assert setup.store.read(run) == results  # chance is that of the seed


def test_gate_logits_are_of_all_tokens_but_padding(routed_run, setup):
    run, model, processor = routed_run
    gates.measure_gates(run, setup)
    measured = setup.store.read(run)["gate_logits"]
    assert set(measured) == {f"model.{side}.layers.{layer}.fc1" for side in ("encoder", "decoder") for layer in (0, 1)}

    heard, model = {name: [] for name in measured}, model.eval()
    for name in measured:
        gate = model.get_submodule(f"base_model.model.{name}.clsr_gate_out.ro")
        gate.register_forward_hook(lambda module, args, output, name=name: heard[name].append(output.flatten()))
    tokens = {"encoder": [], "decoder": []}
    for index, example in enumerate(experiment.load_split(setup, "ro", "test", processor)):
        # 160 samples a frame, two frames a token.
        tokens["encoder"].append(math.ceil((6000 + 3000 * index) / 320))
        tokens["decoder"].append(len(example["labels"]))
        features, labels = (torch.as_tensor(example[name])[None] for name in ("input_features", "labels"))
        with torch.no_grad():
            model(input_features=features, labels=labels)
    assert tokens["encoder"] == [19, 29, 38]  # of 50
    for name, parts in heard.items():
        counts = tokens["decoder" if "decoder" in name else "encoder"]
        logits = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        expected = {"mean": logits.mean().item(), "std": logits.std().item()}
        assert measured[name] == pytest.approx(expected, abs=2e-4), name
        if "encoder" in name:
            assert abs(torch.cat(parts).mean().item() - expected["mean"]) > 1e-2  # with padding


@pytest.mark.parametrize("seconds", [30.0])
def test_the_command_trains_the_grid_in_processes_and_nothing_twice(setup, call_main, monkeypatch, capsys):
    monkeypatch.setattr(compare.os, "cpu_count", lambda: 1)  # of threads
    path = Path(setup.student) / "generation_config.json"
    settings = json.loads(path.read_text())
    settings["suppress_tokens"] = [token for token in range(300) if token != settings["eos_token_id"]]
    path.write_text(json.dumps(settings))  # of all tokens but the last, so that transcripts are short
    for method in ("lora", "low-rank"):
        monkeypatch.setitem(methods.CANDIDATES, method, [(1e-3, 4)])
    arguments = ["--student", setup.student, "--groups", "tuning", "main", "gates"]
    arguments += ["--methods", "lora", "low-rank", "--languages", "ro", "--seeds", 0]
    arguments += ["--precision", "float32", "--max_steps", 2, "--max_utterances", 2]
    call_main(*arguments)
    done = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert done == [
        "[1/3] all_full_seed0_learning_rate=5e-05_max_steps=2",
        "[2/3] ro_lora_seed0_learning_rate=0.001_rank=4_max_steps=2",
        "[3/3] bg_lora_seed0_learning_rate=0.001_rank=4_max_steps=2",
        "[1/2] ro_low-rank_kd-finetuned_seed0_learning_rate=0.001_rank=4_max_steps=2",
        "[2/2] bg_low-rank_kd-finetuned_seed0_learning_rate=0.001_rank=4_max_steps=2",
        "[1/2] ro_zero-shot_seed0_audio_seconds=30_max_steps=2",
        "[2/2] ro_zero-shot_seed0_max_steps=2",
        "[1/1] ro_low-rank_kd-finetuned_seed0_learning_rate=0.001_rank=4_max_steps=2",
        "results",
    ]
    folders = (setup.store.results_dir, setup.store.work_dir)
    written = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    entries = read_table(setup.store.table_dir).values()
    table = [decode(*entry, "student") for entry in entries]
    named = {run_name(results["settings"]): results for results in table}
    assert set(named) == {line.partition(" ")[2] for line in done[:-1]} and len(table) == 7
    # The table and its other file, the weights of the runs that are trained, and a lock.
    assert len(written) == 2 + 5 + 1
    for name, results in named.items():
        assert results.get("train_steps") == (None if "zero-shot" in name else 2)
        assert ("without_gates" in results) == name.startswith("ro_low-rank")
    assert sorted(row["study"] for row, _ in entries) == ["main", "main", "teacher"] + 4 * ["tuning"]
    before = {path: path.stat().st_mtime_ns for path in written}

    call_main(*arguments)
    assert capsys.readouterr().out == f"results: {setup.store.table_dir}\n"
    assert {path: path.stat().st_mtime_ns for path in before} == before
