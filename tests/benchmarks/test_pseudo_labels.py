"""The measurement of pseudo-labels: its runs, going on where it was stopped, and its table."""

import json
import sys

import pytest

from benchmarks import pseudo_labels
from peft_clsr.distillation.pseudo_labels import label
from peft_clsr.inference.subtitles import Transcript


@pytest.fixture
def run(monkeypatch, small_cache, short_windows, capsys):
    """Runs the command on a tiny Whisper and noise; returns its rows and what it printed."""
    short_windows(pseudo_labels)

    def hear(model, processor, waveforms, languages, **settings):  # a tiny Whisper hears nothing in noise
        segments = [{"start": 0.0, "end": 0.1, "text": "frase"}]
        return [Transcript("ro", None, 0.1, segments) for _ in waveforms]

    monkeypatch.setattr(label, "transcribe_waveforms", hear)
    keep_all = pseudo_labels.filter_pseudo_labels
    off = dict.fromkeys(("min_log_probability", "max_compression_ratio", "max_no_speech_probability"))
    monkeypatch.setattr(pseudo_labels, "filter_pseudo_labels", lambda labels: keep_all(labels, **off))
    output = small_cache / "results.jsonl"

    def call(*options):
        folders = ["--cache_dir", small_cache / "cache", "--student", small_cache / "whisper"]
        folders += ["--work_dir", small_cache / "work"]
        settings = ["--transcribed", 2, "--more", 2, "--steps", 5, "--rank", 2, "--output", output]
        monkeypatch.setattr(sys, "argv", ["pseudo_labels", *map(str, [*folders, *settings, *options])])
        pseudo_labels.main()
        return [json.loads(line) for line in output.read_text().splitlines()], capsys.readouterr().out

    return call


def test_the_expert_of_the_transcribed_labels_the_others_and_runs_are_measured_once(run, small_cache):
    rows, printed = run("--seeds", 0)
    assert [row["data"] for row in rows] == ["transcribed", "pseudo-labelled", "all transcribed"]
    assert [row["recordings"] for row in rows] == [2, 4, 4]
    assert rows[1]["kept"] == rows[1]["labels"] == 2
    assert rows[1]["wer_of_labels"] == 0.5
    assert all(row["utterances"] == 2 and len(row["log"]) == 1 for row in rows)
    labels = [*small_cache.glob("work/*/labels/labels-0.jsonl")]
    assert len(labels) == 1 and len(labels[0].read_text().splitlines()) == 2
    again, printed = run("--seeds", 0, 1)
    assert again[:3] == rows and [row["seed"] for row in again[3:]] == [1, 1, 1]
    assert printed.count("WER") == 3 + 1
