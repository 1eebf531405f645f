"""Results on disk: the table and the file of utterances, and how runs get there."""

import gzip
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.comparison import figures
from benchmarks.comparison import store as store_module
from benchmarks.comparison.errors import evaluation_of
from benchmarks.comparison.report import main as report
from benchmarks.comparison.runs import Run, settings_hash, teacher_run
from benchmarks.comparison.store import ResultStore, load, read_table, write_table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SHARES = {"model.encoder.layers.0.fc1": 0.25, "model.decoder.layers.0.fc1": 1.0}


@pytest.fixture
def store(tmp_path):
    return ResultStore(tmp_path / "results", tmp_path / "work", "whisper-base")


def result_of(run, errors=(1, 0, 2)):
    """A result as `execute` writes it."""
    evaluation = evaluation_of([[count, 0, 1, 3, 4 * count, 17] for count in errors])
    splits = ("validation", "test", "out_of_domain")
    if run.language == "all":
        splits = [f"{language} {split}" for language in ("ro", "bg") for split in splits]
    return {
        "settings": asdict(run) | {"student": "whisper-base", "precision": "float32"},
        "machine": {"device": "a CPU", "precision": "float32", "cores": 2, "threads": 1, "torch": "2.13.0"},
        "evaluations": dict.fromkeys(splits, evaluation),
        "gates": {"test": SHARES},
        "log": [{"loss": 2.5, "step": 25}],
        "trained_parameters": 10,
        "train_utterances": 400,
        "train_steps": 150,
        "train_seconds": 7,
        "seconds": 8.5,
    }


def two_runs():
    return Run("lora", "ro", learning_rate=1e-3, rank=64), Run("clsr", "ca", seed=1, teacher="org/whisper")


def files_of(store):
    return {path.name: path.read_bytes() for path in store.table_dir.iterdir()}


@pytest.mark.parametrize("run", [*two_runs(), teacher_run(), Run("zero-shot", "ro", audio_seconds=30.0)])
def test_a_collected_result_is_read_as_it_was_written(run, store):
    result = result_of(run)
    result["untouched"] = {
        "en": evaluation_of([[0, 1, 0, 2, 3, 9]]),
        "translate-ro": {"chrF": 12.345678901234567, "bleu": 3.5},
    }
    result["without_gates"] = {"half at random": {"test": evaluation_of([[2, 1, 0, 7, 3, 30]])}}
    result["gate_logits"] = {"model.encoder.layers.0.fc1": {"mean": -0.5, "std": 0.25}}
    store.write(run, result)
    assert store.read(run) == result
    assert store.collect({run: "main"}) == 1
    assert not store.results_file(run).exists()
    # JSON tells 7 and 7.0 apart.
    assert json.dumps(store.read(run), sort_keys=True) == json.dumps(result, sort_keys=True)
    assert store.read(replace(run, seed=7)) is None


def test_the_table_does_not_depend_on_the_order_of_runs(store, tmp_path):
    other = replace(store, results_dir=tmp_path / "other")
    runs = two_runs()
    for run in runs:
        store.write(run, result_of(run))
        store.collect({run: "main"})
    for run in runs:
        other.write(run, result_of(run))
    assert other.collect(dict.fromkeys(reversed(runs), "main")) == 2
    assert files_of(store) == files_of(other)
    assert gzip.decompress(files_of(store)["utterances.jsonl.gz"]).count(b"\n") == 2


def test_only_finished_runs_are_collected_and_only_once(store):
    finished, missing = two_runs()
    store.write(finished, result_of(finished))
    studies = {finished: "main", missing: "main"}
    assert store.collect(studies) == 1
    before = {path: path.stat().st_mtime_ns for path in store.table_dir.iterdir()}
    assert store.collect(studies) == 0
    assert {path: path.stat().st_mtime_ns for path in store.table_dir.iterdir()} == before
    assert store.read(missing) is None


def test_a_run_that_is_measured_again_replaces_its_row_and_keeps_its_study(store):
    run, other = two_runs()
    for each in (run, other):
        store.write(each, result_of(each))
    store.collect({run: "tuning", other: "main"})
    store.write(run, store.read(run) | {"untouched": {"en": evaluation_of([[0, 0, 0, 2, 0, 9]])}})
    assert "untouched" in store.read(run)  # a folder's results come before the table's
    store.collect({run: "main"})
    assert "untouched" in store.read(run)
    assert [row["study"] for row, _ in read_table(store.table_dir).values()] == ["main", "tuning"]


@pytest.mark.parametrize("stop_at", ["utterances.jsonl.gz", "runs.csv"])
def test_a_stopped_collection_loses_nothing(stop_at, store, monkeypatch):
    run, other = two_runs()
    store.write(run, result_of(run))
    store.collect({run: "main"})
    store.write(other, result_of(other))
    write_bytes = store_module.write_bytes

    def stop(path, content):
        if path.name == stop_at:
            raise KeyboardInterrupt
        write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_bytes", stop)
        with pytest.raises(KeyboardInterrupt):
            store.collect({other: "main"})
    assert len(load(store.results_dir)) == 1
    assert store.read(other) == result_of(other)
    assert store.collect({other: "main"}) == 1
    assert [result["settings"]["method"] for result in load(store.results_dir)] == ["clsr", "lora"]


def test_numbers_that_are_not_finite_are_written_as_null(store):
    run, _ = two_runs()
    result = result_of(run) | {"log": [{"grad_norm": float("nan"), "loss": float("inf"), "step": 25}]}
    store.write(run, result)
    assert "NaN" not in store.results_file(run).read_text()
    store.collect({run: "main"})
    assert store.read(run)["log"] == [{"grad_norm": None, "loss": None, "step": 25}]


def test_a_hash_tells_every_setting_and_survives_a_new_default():
    run, other = two_runs()
    hashes = {settings_hash(asdict(replace(run, **change))) for change in ({}, {"rank": 8}, {"teacher": "base"})}
    assert len(hashes) == 3
    assert run.key == f"ro_lora_seed0_{settings_hash(asdict(run))}"
    assert settings_hash(asdict(replace(run, language="ca", seed=3, method="full"))) == settings_hash(asdict(run))
    # Settings with a default may be missing, as in results from before a setting was added.
    partial = {name: value for name, value in asdict(run).items() if name != "straight_through"}
    assert settings_hash(partial) == settings_hash(asdict(run))


def test_a_table_that_does_not_fit_its_utterances_is_refused(store):
    run, _ = two_runs()
    store.write(run, result_of(run))
    store.collect({run: "main"})
    ((row, line),) = read_table(store.table_dir).values()

    def check(message, rows, lines):
        write_table(store.table_dir, zip(rows, lines, strict=True))
        with pytest.raises(ValueError, match=message):
            load(store.results_dir)

    check("has two rows of ro lora 0", [row, row], [line, line])
    check("has no line of ro lora 0", [row], [line.replace('"ro"', '"ca"', 1)])
    check("its settings have the hash", [row | {"rank": "8"}], [line])
    check("the cer of 'test' is 0.9, but its utterances give 0.235294", [row | {"test_cer": "0.9"}], [line])


# ----------------------------------------------------------------------------------------------- the committed results


def test_committed_results_give_the_committed_tables_and_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(figures.Figure, "savefig", lambda *args, **kwargs: None)  # takes seconds
    report(["--results_dir", str(RESULTS), "--output_dir", str(tmp_path)])
    for name in ("tables.md", "numbers.json"):
        assert (tmp_path / name).read_text() == (ROOT / "docs" / "results" / name).read_text(), name


def test_committed_files_are_those_that_a_collection_would_write(tmp_path):
    table = read_table(RESULTS / "whisper-base")
    assert len(table) >= 122
    write_table(tmp_path, table.values())
    assert (tmp_path / "runs.csv").read_bytes() == (RESULTS / "whisper-base" / "runs.csv").read_bytes()
    lines, committed = (
        gzip.decompress((folder / "utterances.jsonl.gz").read_bytes())
        for folder in (tmp_path, RESULTS / "whisper-base")
    )
    assert lines == committed
    assert "NaN" not in committed.decode()
