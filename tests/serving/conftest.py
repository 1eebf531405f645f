"""A tiny Whisper with an expert for each of five languages, and recordings."""

from types import SimpleNamespace

import pytest
import soundfile
from conftest import SPECIAL_TOKENS, build_tokenizer, build_whisper
from helpers import noise, random_clsr, write_container
from transformers import WhisperFeatureExtractor, WhisperProcessor

TIMESTAMPS = [f"<|{position / 50:.2f}|>" for position in range(51)]
LANGUAGES = ("ca", "ro", "be", "bg", "el")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with the model `tiny`, of 1 s of context, and its `experts`."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = build_tokenizer([*SPECIAL_TOKENS, *TIMESTAMPS])
    whisper = build_whisper(tokenizer, init_std=0.2, vocab_size=len(tokenizer))
    whisper.generation_config.max_length = 12  # noise makes a random model talk without end
    whisper.save_pretrained(folder / "tiny")
    WhisperProcessor(WhisperFeatureExtractor(chunk_length=1), tokenizer).save_pretrained(folder / "tiny")
    random_clsr(whisper, *LANGUAGES).save_pretrained(folder / "experts")
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Sixteen recordings, shorter and longer than the context, each in a language. One has no expert."""
    folder = tmp_path_factory.mktemp("recordings")
    found = []
    for index in range(16):
        seconds = (0.4, 0.9, 2.3, 3.1)[index % 4] + index / 100
        path = folder / f"{index}{('.wav', '.mp3', '.flac', '.m4a')[index // 4]}"
        if path.suffix == ".m4a":
            write_container(path, noise(seconds, seed=index), 16000, "aac")
        else:
            soundfile.write(path, noise(seconds, seed=index), 16000)
        found.append(SimpleNamespace(path=path, language=[*LANGUAGES, "fr"][index % 6]))
    return found
