"""Whispers with experts to export, and the command."""

import copy
import os

import pytest
import torch
from filelock import FileLock
from peft import get_peft_model
from transformers import WhisperFeatureExtractor, WhisperProcessor

datasets = pytest.importorskip("datasets")
pytest.importorskip("jiwer")

from conftest import SPECIAL_TOKENS, build_tokenizer
from freezing import MODULES, recordings, set_gates
from helpers import random_clsr

from peft_clsr import CLSRConfig, freeze_routing, prepare_dataset
from peft_clsr.cli import main

TIMESTAMPS = [f"<|{position / 50:.2f}|>" for position in range(51)]
# Layers of encoder and decoder, and settings of the experts. Each layer costs seconds when a graph is traced.
KINDS = {"low-rank": (2, {"expert_rank": 4}), "full": (1, {})}


@pytest.fixture(scope="session")
def processor():
    """A processor of 1 s, with tokens of times."""
    return WhisperProcessor(WhisperFeatureExtractor(chunk_length=1), build_tokenizer([*SPECIAL_TOKENS, *TIMESTAMPS]))


@pytest.fixture
def bilingual(tiny_whisper, processor):
    """Whispers with a Catalan and a Romanian expert, gates of both kinds of decisions in each layer."""

    def build(kind="low-rank"):
        layers, config = KINDS[kind]
        sizes = {"encoder_layers": layers, "decoder_layers": layers, "vocab_size": len(processor.tokenizer)}
        whisper = tiny_whisper(init_std=0.2, **sizes)
        whisper.generation_config.no_timestamps_token_id = processor.tokenizer.convert_tokens_to_ids(
            "<|notimestamps|>"
        )
        whisper.generation_config.max_length = 12
        return random_clsr(whisper, "ca", "ro", **config)

    return build


@pytest.fixture(scope="session")
def export_once(tmp_path_factory):
    """`export_once("onnx/full", write)` is a folder that `write(folder)` writes once, for all workers."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def call(name, write):
        folder = root / "exports" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                write(folder)
        return folder

    return call


@pytest.fixture
def dataset(tiny_processor):
    return prepare_dataset(recordings(), tiny_processor, "ca")[0]


@pytest.fixture
def freeze(dataset, tiny_processor):
    """`freeze_routing` on the dataset, with short transcripts."""

    def call(model, language="ca", **kwargs):
        defaults = {"dataset": dataset, "processor": tiny_processor, "max_new_tokens": 6, "batch_size": 2}
        return freeze_routing(model, language, **(defaults | kwargs))

    return call


@pytest.fixture
def routed(tiny_whisper):
    """`routed([EXPERT, SHARED, MIXED, EXPERT])` is a Whisper with an expert "ca" and gates of `MODULES` that do so."""

    def build(gates, adapters=("ca",), base=None, **config):
        base = tiny_whisper(init_std=0.5, max_target_positions=20) if base is None else base
        torch.manual_seed(0)
        for name in adapters:
            clsr = CLSRConfig.paper(gate_dim=8, language=name, **config)
            if name == adapters[0]:
                model = get_peft_model(base, clsr, adapter_name=name)
            else:
                model.add_adapter(name, clsr)
        set_gates(model, dict(zip(MODULES, gates, strict=True)))
        return model.eval()

    return build


@pytest.fixture
def ctranslate2():
    return pytest.importorskip("ctranslate2")


@pytest.fixture
def export(routed, tiny_whisper, tiny_processor, ctranslate2, tmp_path, monkeypatch, capsys):
    """Runs `peft-clsr export` on an adapter of these gates; returns its exit status and its output."""
    pytest.importorskip("faster_whisper")
    soundfile = pytest.importorskip("soundfile")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    base = tiny_whisper(init_std=0.5, max_source_positions=150)
    base.save_pretrained(tmp_path / "base")
    WhisperProcessor(WhisperFeatureExtractor(chunk_length=3), tiny_processor.tokenizer).save_pretrained(
        tmp_path / "base"
    )
    for split in ("train", "test"):
        (tmp_path / "speech" / split).mkdir(parents=True)
        rows = ["file_name,transcription"]
        for i, item in enumerate(recordings()):
            soundfile.write(tmp_path / "speech" / split / f"{i}.wav", item["audio"]["array"], 16000)
            rows.append(f"{i}.wav,{item['transcription']}")
        (tmp_path / "speech" / split / "metadata.csv").write_text("\n".join(rows) + "\n")

    def run(gates, *arguments, **config):
        config = {"max_audio_seconds": 1, **config}
        routed(gates, base=copy.deepcopy(base), **config).save_pretrained(tmp_path / "adapters")
        command = ["export", "--base", tmp_path / "base", "--adapter", tmp_path / "adapters" / "ca"]
        command += ["--language", "catalan", "--dataset", tmp_path / "speech", "--output_dir", tmp_path / "out"]
        try:
            status = main([str(part) for part in [*command, "--max_new_tokens", 6, *arguments]])
        except SystemExit as error:
            status = error.code
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run
