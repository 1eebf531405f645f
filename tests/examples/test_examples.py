"""The pages of `examples/`, each run for a few steps with tiny random Whispers and noise."""

import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from peft import PeftModel, get_peft_model
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor

from peft_clsr import CLSRConfig, list_languages
from peft_clsr.cli.app import make_parser

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs an example with the given options; returns what it printed."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")

    def call(name, *options):
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture
def whisper(tiny_whisper, tiny_processor, tmp_path):
    """The folder of a tiny Whisper."""
    tiny_whisper(max_target_positions=256).save_pretrained(tmp_path / "whisper")
    tiny_processor.save_pretrained(tmp_path / "whisper")
    return tmp_path / "whisper"


@pytest.fixture
def recordings(tmp_path):
    """Noise: four recordings to train on and two to test on, in Catalan and Romanian by turns."""
    generator = np.random.default_rng(0)
    for split, size in (("train", 4), ("test", 2)):
        (tmp_path / "recordings" / split).mkdir(parents=True)
        rows = ["file_name,transcription,language"]
        for i in range(size):
            samples = generator.normal(0, 0.1, 8000).astype(np.float32)
            soundfile.write(tmp_path / "recordings" / split / f"{i}.wav", samples, 16000)
            rows.append(f"{i}.wav,frase {i},{('ca', 'ro')[i % 2]}")
        (tmp_path / "recordings" / split / "metadata.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "recordings"


@pytest.fixture
def experts(whisper, tmp_path):
    """A folder of random experts of Catalan and Romanian."""
    base = WhisperForConditionalGeneration.from_pretrained(whisper, dtype=torch.float32)
    model = get_peft_model(base, CLSRConfig.paper(language="ca", expert_rank=2), adapter_name="ca")
    model.add_adapter("ro", CLSRConfig.paper(language="ro", expert_rank=2))
    model.save_pretrained(tmp_path / "experts")
    return tmp_path / "experts"


def loaded(whisper, folder, language):
    base = WhisperForConditionalGeneration.from_pretrained(whisper, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder, subfolder=language, adapter_name=language)


def test_train_one_language(run, whisper, recordings, tmp_path):
    options = ("--model", whisper, "--data", recordings, "--language", "catalan")
    printed = run("train_one_language.py", *options, "--output_dir", tmp_path / "out", "--max_steps", 2)
    assert "with the expert: WER" in printed and "base model: WER" in printed
    config = loaded(whisper, tmp_path / "out", "ca").peft_config["ca"]
    assert (config.language, config.expert_rank, config.straight_through) == ("ca", 32, True)


def test_new_language(run, tiny_whisper, tiny_processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whisper, tokenizer = tmp_path / "whisper", tiny_processor.tokenizer
    tokenizer.add_tokens([f"<|{0.02 * step:.2f}|>" for step in range(1501)])
    sizes = {"max_source_positions": 1500, "max_target_positions": 448, "vocab_size": len(tokenizer)}
    tiny_whisper(**sizes).save_pretrained(whisper)  # at Whisper's own 30 s, which pack_utterances fills
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(whisper)
    generator = np.random.default_rng(0)
    for split, size in (("train", 3), ("test", 2)):  # what examples/demo/speak.py makes
        folder = tmp_path / ".cache/espeak-eo" / split
        folder.mkdir(parents=True)
        rows = ["file_name,transcription,language"]
        for i in range(size):
            soundfile.write(folder / f"{i}.wav", generator.normal(0, 0.1, 3000), 16000)
            rows.append(f"{i}.wav,frazo {i},eo")
        (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    printed = run(
        "new_language.py", "--model", whisper, "--prompt_language", "ro", "--bf16", "--max_steps", 2, "--test_size", 1
    )
    before, after = re.findall(r"(?:before|after): WER [\d.]+%, CER [\d.]+%", printed)
    assert before.startswith("before") and after.startswith("after")
    config = loaded(whisper, tmp_path / "runs/new-language", "eo").peft_config["eo"]
    assert (config.language, config.prompt_language) == ("eo", "ro")


def test_train_with_teacher(run, whisper, recordings, tmp_path):
    shutil.copytree(whisper, tmp_path / "teacher")
    options = ("--model", whisper, "--teacher", tmp_path / "teacher", "--data", recordings, "--languages", "ca", "ro")
    run("train_with_teacher.py", *options, "--output_dir", tmp_path / "out", "--max_steps", 2)
    for language in ("ca", "ro"):
        assert loaded(whisper, tmp_path / "out", language).peft_config[language].language == language


def test_transcribe_mixed_batch(run, whisper, experts, recordings):
    files = [recordings / "train" / f"{i}.wav" for i in range(3)]
    spoken = [f"{language}={file}" for language, file in zip(("ca", "ro", "fr"), files, strict=True)]
    options = ("--model", whisper, "--adapters", experts, "--max_new_tokens", 4, "--recordings", *spoken)
    printed = run("transcribe_mixed_batch.py", *options)
    assert all(f"{file}: " in printed for file in files)


def test_publish(run, whisper, experts, recordings, hub):
    options = ("--model", whisper, "--adapters", experts, "--language", "ca", "--dataset", recordings)
    assert hub.endpoint in run("publish.py", *options, "--repo_id", "me/experts")
    (language,) = list_languages("me/experts")
    assert language.code == "ca" and language.results[str(recordings)]["utterances"] == 1


def test_export(run, whisper, experts, recordings, tmp_path):
    options = ("--model", whisper, "--adapter", experts, "--language", "ca", "--data", recordings)
    printed = run("export.py", *options, "--output_dir", tmp_path / "plain")
    assert "routed" in printed and "frozen" in printed
    plain = WhisperForConditionalGeneration.from_pretrained(tmp_path / "plain")
    assert not any("clsr" in name for name in plain.state_dict())
    assert WhisperProcessor.from_pretrained(tmp_path / "plain").feature_extractor.n_samples == 16000


@pytest.mark.parametrize("page", sorted(EXAMPLES.glob("*.py")), ids=lambda page: page.name)
def test_a_page_fits_a_screen_and_uses_the_public_api(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert len(lines) < (160 if page.name == "transcribe_archive.py" else 60)
    assert not any(line.strip().startswith(("from peft_clsr.", "import peft_clsr.")) for line in lines)


@pytest.mark.parametrize("tables", [[], ["examples/metadata.csv"]])
def test_the_space_starts_the_command_of_the_page(tables, run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for table in tables:
        Path(table).parent.mkdir()
        Path(table).write_text("file_name,transcription\n")
    started = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append((program, command)))
    run("space/app.py")
    [(program, [_, module, package, name, *options])] = started
    assert (program, module, package, name) == (sys.executable, "-m", "peft_clsr", "app")
    settings = make_parser("peft-clsr app").parse_args(options)
    assert (settings.host, settings.port, settings.max_seconds) == ("0.0.0.0", 7860, 300)
    assert settings.examples == tables and settings.model and settings.adapters
