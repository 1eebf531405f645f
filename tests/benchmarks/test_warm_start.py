"""The measurement of warm starts: the grid, going on where it was stopped, and its table."""

import json
import sys

import pytest

from benchmarks import warm_start


@pytest.fixture
def run(monkeypatch, small_cache, short_windows, capsys):
    """Runs the command on a tiny Whisper and noise; returns its rows and what it printed."""
    short_windows(warm_start)
    output = small_cache / "results.jsonl"

    def call(*options):
        folders = ["--cache_dir", small_cache / "cache", "--student", small_cache / "whisper"]
        folders += ["--work_dir", small_cache / "work"]
        settings = ["--sizes", 2, "--steps", 5, "--source_steps", 1, "--rank", 2, "--output", output]
        monkeypatch.setattr(sys, "argv", ["warm_start", *map(str, [*folders, *settings, *options])])
        warm_start.main()
        return [json.loads(line) for line in output.read_text().splitlines()], capsys.readouterr().out

    return call


def test_the_grid_is_measured_once_and_goes_on_with_what_is_missing(run, tmp_path):
    rows, printed = run("--seeds", 0)
    found = [(row["size"], row["seed"], row["start"]) for row in rows]
    assert found == [(0, 0, "cold"), (0, 0, "warm"), (2, 0, "cold"), (2, 0, "warm")]
    assert all(row["utterances"] == 2 for row in rows)
    assert [len(row["log"]) for row in rows] == [0, 0, 1, 1]
    assert (tmp_path / "work/ro-1-rank2-0.002/ro/adapter_model.safetensors").is_file()
    assert printed.count("WER") == 4 + 2
    again, printed = run("--seeds", 0, 1)
    assert again[:4] == rows and [(row["seed"], row["start"]) for row in again[4:]] == [(1, "cold"), (1, "warm")]
    assert printed.count("WER") == 2 + 2


def test_the_table_has_differences_of_the_same_seed():
    wers = {("cold", 0): 0.5, ("warm", 0): 0.4, ("cold", 1): 0.3, ("warm", 1): 0.32}
    rows = [{"size": 50, "start": start, "seed": seed, "wer": wer} for (start, seed), wer in wers.items()]
    assert warm_start.table(rows).splitlines()[-1] == "| 50 | 40.0 | 36.0 | -4.0 (-10.0 to +2.0) |"
