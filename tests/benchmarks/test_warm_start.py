"""The measurement of warm starts: the grid, going on where it was stopped, and its table."""

import json
import sys

import numpy as np
import pytest
import soundfile

from benchmarks import warm_start

SMALL = {"max_seconds": 1.0, "timestamps": 0}  # what the tiny Whisper knows


@pytest.fixture
def run(monkeypatch, tmp_path, tiny_whisper, tiny_processor, capsys):
    """Runs the command on a tiny Whisper and noise; returns its rows and what it printed."""
    tiny_whisper(max_target_positions=448).save_pretrained(tmp_path / "whisper")
    tiny_processor.save_pretrained(tmp_path / "whisper")
    generator = np.random.default_rng(0)
    for language in ("ro", "ca"):
        for split, size in (("train", 4), ("test", 2)):
            folder = tmp_path / "cache" / f"tuxpaint-{language}" / split
            folder.mkdir(parents=True)
            lines = ["file_name,transcription,language"]
            for i in range(size):
                soundfile.write(folder / f"{i}.wav", generator.normal(0, 0.1, 3000), 16000)
                lines.append(f"{i}.wav,frase {i},{language}")
            (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(warm_start, "fetch_whisper", lambda target: None)
    pack = warm_start.pack_utterances
    monkeypatch.setattr(warm_start, "pack_utterances", lambda *args, **kwargs: pack(*args, **kwargs, **SMALL))
    output = tmp_path / "results.jsonl"

    def call(*options):
        folders = [
            "--cache_dir",
            tmp_path / "cache",
            "--student",
            tmp_path / "whisper",
            "--work_dir",
            tmp_path / "work",
        ]
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
