"""The world of the documentation: recordings, tiny Whispers on a Hub of the loopback, and a trained run.

`docs/` tells of `openai/whisper-base`, of a folder `my_recordings` and of the run `runs/ca`. Here they exist, small.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import SPECIAL_TOKENS, build_tokenizer, build_whisper
from filelock import FileLock
from helpers import random_clsr, syllables
from hub_server import TOKENS, HubServer
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from peft_clsr import save_language
from peft_clsr.hub.card import write_folder_card

SENTENCES = [
    f"{who} {where}."
    for where in ("a la plaça", "a prop del riu", "al mercat", "a la muntanya")
    for who in ("Ens trobem", "Els nens juguen", "Demà anirem", "Avui plou", "Visc", "Hi ha molta gent")
]


def _processor_and_model(*, languages, mel_bins=80, seed=0):
    """Whisper's context (30 s, 448 tokens), languages and timestamps in a random model, which says one sentence."""
    codes = [f"<|{code}|>" for code in languages]
    tokenizer = build_tokenizer([*SPECIAL_TOKENS[:2], *codes, *SPECIAL_TOKENS[-6:]])
    tokenizer.add_tokens([f"<|{step / 50:.2f}|>" for step in range(1501)])
    model = build_whisper(
        tokenizer,
        seed,
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,  # a graph of two takes twice as long
        num_mel_bins=mel_bins,
        max_source_positions=1500,
        max_target_positions=448,
    )
    settings = model.generation_config
    settings.lang_to_id = {code: tokenizer.convert_tokens_to_ids(code) for code in codes}
    settings.alignment_heads = [[0, 0], [0, 1]]
    _say(model, tokenizer, SENTENCES[0])
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=mel_bins), tokenizer), model


@torch.no_grad()
def _say(model, tokenizer, text):
    """Each position's embedding calls for the next token of a text: the model is sure of it, and comes to an end."""
    decoder = model.model.decoder
    tokens = decoder.embed_tokens.weight
    tokens[tokenizer.pad_token_id] = torch.randn(tokens.shape[1], generator=torch.Generator().manual_seed(0))  # was 0
    tokens.sub_(tokens.mean(-1, keepdim=True))  # the last layer norm then keeps their directions
    tokens.mul_(10 / tokens.norm(dim=-1, keepdim=True))
    said = tokenizer.convert_tokens_to_ids(["<|ca|>", "<|transcribe|>", "<|0.00|>"])
    said += tokenizer(f" {text}", add_special_tokens=False).input_ids
    positions = decoder.embed_positions.weight
    positions.copy_(10 * tokens[tokenizer.eos_token_id])
    positions[: len(said)] = 10 * tokens[said]


def _write_hub(folder):
    base = [code for code in LANGUAGES if code != "yue"]
    for name, settings in {
        "whisper-base": {"languages": base},
        "whisper-small": {"languages": base, "seed": 1},
        "whisper-large-v3": {"languages": list(LANGUAGES), "mel_bins": 128, "seed": 2},
    }.items():
        processor, model = _processor_and_model(**settings)
        model.save_pretrained(folder / "openai" / name)
        processor.save_pretrained(folder / "openai" / name)
    base = WhisperForConditionalGeneration.from_pretrained(folder / "openai" / "whisper-base", dtype=torch.float32)
    base.name_or_path = base.config._name_or_path = "openai/whisper-base"
    experts = random_clsr(base, "ca", "uk", expert_rank=4)
    metrics = {"google/fleurs": {"wer": 0.25, "cer": 0.1, "base_wer": 0.5, "base_cer": 0.2, "split": "test"}}
    for language in ("ca", "uk"):
        save_language(experts, folder / "me" / "whisper-base-experts", language, metrics=metrics)
    write_folder_card(folder / "me" / "whisper-base-experts")
    shutil.copytree(folder / "me" / "whisper-base-experts", folder / "somebody" / "whisper-base-experts")


def _write_recordings(folder):
    def write(name, seconds, seed):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, syllables(seconds, seed=seed), 16000)

    rows = ["file_name,transcription"]
    for number in range(24):
        name = f"{number:02}.wav"
        write(f"my_recordings/{name}", 1 + number % 3 / 2, number)
        rows.append(f"{name},{SENTENCES[number]}")
    (folder / "my_recordings" / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")

    write("my_talks/long_talk.wav", 40, 100)
    cues = [
        f"{number + 1}\n00:00:{4 * number:02},200 --> 00:00:{4 * number + 3:02},800\n{SENTENCES[number]}\n"
        for number in range(10)
    ]
    (folder / "my_talks" / "long_talk.srt").write_text("\n".join(cues), encoding="utf-8")
    for number in range(3):
        write(f"new_recordings/{number}.wav", 1.5, 200 + number)
    write("recording.wav", 2, 300)


def _write_demo(hub, page):
    """Write the files that `make demo` leaves behind, for the README."""
    shutil.copytree(hub / "openai" / "whisper-base", page / ".cache" / "whisper-base")
    whisper = WhisperForConditionalGeneration.from_pretrained(page / ".cache" / "whisper-base", dtype=torch.float32)
    save_language(random_clsr(whisper, "ro", expert_rank=4), page / "runs" / "demo-ro", "ro")
    recording = page / ".cache/tuxpaint-ro/test/clothes__hats__wizardhat_desc_ro.ogg"
    recording.parent.mkdir(parents=True)
    soundfile.write(recording, syllables(2, seed=400), 16000)


def _environment(hub, home):
    """This process' variables, those of the Hub's client aside. Programs of this Python come first on the path."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTEST_"))}
    return {
        **kept,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]]),
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": "hf_mine",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _serve(folder):
    """A Hub with the repositories of `folder/OWNER/NAME`."""
    hub = HubServer(TOKENS)
    for repository in folder.glob("*/*"):
        paths = [path for path in repository.rglob("*") if path.is_file()]
        files = {path.relative_to(repository).as_posix(): path.read_bytes() for path in paths}
        hub.create(repository.relative_to(folder).as_posix(), files=files)
    return hub


def _build(folder):
    _write_hub(folder / "hub")
    page = folder / "page"
    _write_recordings(page)
    _write_demo(folder / "hub", page)
    command = (
        "peft-clsr train --student openai/whisper-base --dataset my_recordings --languages ca --output_dir runs/ca"
    )
    with _serve(folder / "hub") as hub:
        ran = subprocess.run(
            command.split(),
            cwd=page,
            env=_environment(hub, folder / "home"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    assert ran.returncode == 0, ran.stdout
    shutil.rmtree(folder / "home")


@pytest.fixture(scope="session")
def world(tmp_path_factory, worker_id):
    """A folder with `page`, which a page's blocks start from, and `hub`. Built once for all workers of xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "docs-world"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _build(folder.with_suffix(".part"))
            folder.with_suffix(".part").rename(folder)
    return folder


@pytest.fixture
def page_world(world, tmp_path):
    """A copy of the world for one page: its folder, and the environment of its blocks."""
    shutil.copytree(world / "page", tmp_path / "page")
    with _serve(world / "hub") as hub:
        yield tmp_path / "page", _environment(hub, tmp_path / "home")
