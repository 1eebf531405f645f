"""The pages of `examples/` run for a few steps, on tiny random Whispers and noise."""

import runpy
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from helpers import QUIET, randomize
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model
from transformers import WhisperForConditionalGeneration

from peft_clsr import CLSRConfig, list_languages

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def folders(tiny_whisper, tiny_processor, tmp_path, monkeypatch):
    """The working directory holds `model`, `teacher`, `my_recordings` of Romanian and Catalan, and `experts`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, seed in (("model", 0), ("teacher", 1)):
        tiny_whisper(seed=seed, init_std=0.2, max_target_positions=256).save_pretrained(name)
        tiny_processor.save_pretrained(name)
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        (tmp_path / "my_recordings" / split).mkdir(parents=True)
        rows = ["file_name,transcription,language"]
        for i, language in enumerate(["ro", "ca", "ro", "ca"]):
            samples = generator.normal(0, 0.1, 8000 + 1000 * i).astype(np.float32)
            soundfile.write(tmp_path / "my_recordings" / split / f"{i}.wav", samples, 16000)
            rows.append(f"{i}.wav,text {i},{language}")
        (tmp_path / "my_recordings" / split / "metadata.csv").write_text("\n".join(rows) + "\n")
    whisper = WhisperForConditionalGeneration.from_pretrained("model", dtype=torch.float32)
    model = get_peft_model(whisper, CLSRConfig(language="ro", gate_dim=8, **QUIET), adapter_name="ro")
    model.add_adapter("ca", CLSRConfig(language="ca", gate_dim=8, **QUIET))
    randomize(model).save_pretrained("experts")
    return tmp_path


@pytest.fixture
def run(folders, monkeypatch, capsys):
    """Runs a page with options; returns what it printed."""

    def call(name, *options):
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_train_one_language(run, folders):
    printed = run("train_one_language.py", "--model", "model", "--language", "ro", "--max_steps", 2)
    assert "'ro': {'wer': " in printed and "'utterances': 2" in printed
    whisper = WhisperForConditionalGeneration.from_pretrained("model")
    model = PeftModel.from_pretrained(whisper, "runs/one_language", subfolder="ro", adapter_name="ro")
    assert model.peft_config["ro"].expert_rank == 64


def test_train_with_teacher(run, folders):
    models = ("--student", "model", "--teacher", "teacher")
    run("train_with_teacher.py", *models, "--languages", "ro", "ca", "--max_steps", 2)
    assert {path.parent.name for path in Path("runs/with_teacher").glob("*/adapter_model.safetensors")} == {"ro", "ca"}
    assert Path("runs/with_teacher/teacher/teacher/teacher.json").is_file()


def test_transcribe_mixed_batch(run, folders):
    files = [f"my_recordings/test/{i}.wav" for i in range(3)]
    recordings = [f"{file}={language}" for file, language in zip(files, ("ro", "ca", "fr"), strict=True)]
    printed = run("transcribe_mixed_batch.py", *recordings, "--model", "model", "--experts", "ro", "ca")
    assert [line.partition(": ")[0] for line in printed.splitlines()] == files


def test_publish(run, folders, hub):
    HfApi().create_repo("me/experts")
    printed = run("publish.py", "--model", "model", "--language", "ro", "--repo_id", "me/experts")
    assert hub.endpoint in printed
    (language,) = list_languages("me/experts")
    assert language.code == "ro" and language.results["my_recordings"]["utterances"] == 2


def test_export(run, folders):
    options = ("--adapter", "experts/ro", "--language", "ro", "--output_dir", "exported")
    printed = run("export.py", "--model", "model", *options)
    assert "routed, " in printed and " frozen" in printed
    assert type(WhisperForConditionalGeneration.from_pretrained("exported")) is WhisperForConditionalGeneration


@pytest.mark.parametrize("page", sorted(EXAMPLES.glob("*.py")), ids=lambda page: page.name)
def test_pages_are_short(page):
    assert len(page.read_text().splitlines()) <= 75
