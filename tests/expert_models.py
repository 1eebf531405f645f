"""A tiny Whisper with an expert for each of five languages."""

import pytest
from conftest import SPECIAL_TOKENS, build_tokenizer, build_whisper
from helpers import random_clsr
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
