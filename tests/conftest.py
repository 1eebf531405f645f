"""Tiny models and processors built in memory: no test of this project needs the network or a real checkpoint."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported, which reads it once

import functools
import logging

import pytest
import torch
from hub_server import hub  # noqa: F401
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

LANGUAGES = ("en", "ro", "ca", "be", "bg", "el", "fr")
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    *(f"<|{language}|>" for language in LANGUAGES),
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)


def build_tokenizer(special_tokens=SPECIAL_TOKENS) -> WhisperTokenizer:
    """A Whisper tokenizer of 256 bytes (one token a byte, no merges) and the special tokens."""
    symbols = [*bytes_to_unicode().values(), *special_tokens]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[], pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special_tokens)})
    tokenizer.set_prefix_tokens(language=None, task=None)  # looks its ids up again, now that the tokens are special
    return tokenizer


@pytest.fixture(autouse=True)
def log_levels():
    """Commands set the levels of loggers for their process; the next test has them as they were."""
    loggers = [logging.getLogger(name) for name in ("peft_clsr", "transformers")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def tiny_processor() -> WhisperProcessor:
    """Whisper's real feature extractor at 1 s of context (80 mel bins, 100 frames) with the byte tokenizer."""
    return WhisperProcessor(WhisperFeatureExtractor(chunk_length=1), build_tokenizer())


def build_whisper(tokenizer, seed: int = 0, **config_kwargs) -> WhisperForConditionalGeneration:
    """A tiny random Whisper for a tokenizer, see `tiny_whisper`."""
    token_id = tokenizer.convert_tokens_to_ids
    settings = {
        "vocab_size": len(tokenizer),
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "num_mel_bins": 80,
        "max_source_positions": 50,
        "max_target_positions": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "pad_token_id": token_id("<|endoftext|>"),
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|endoftext|>"),
        "decoder_start_token_id": token_id("<|startoftranscript|>"),
        # The defaults are ids of the real, larger vocabulary.
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    settings.update(config_kwargs)
    with torch.random.fork_rng(devices=[]):  # a test's own seed stays as it is
        torch.manual_seed(seed)
        model = WhisperForConditionalGeneration(WhisperConfig(**settings)).eval()
    generation_config = model.generation_config
    generation_config._from_model_config = False  # or loading would make it anew from the model's config
    generation_config.is_multilingual = True
    generation_config.lang_to_id = {f"<|{code}|>": token_id(f"<|{code}|>") for code in LANGUAGES}
    generation_config.task_to_id = {task: token_id(f"<|{task}|>") for task in ("transcribe", "translate")}
    generation_config.no_timestamps_token_id = token_id("<|notimestamps|>")
    generation_config.max_length = settings["max_target_positions"]
    return model


@pytest.fixture
def tiny_whisper(tiny_processor):
    """A factory: `tiny_whisper()` gives a random Whisper in evaluation mode, the same weights at every call.

    `tiny_whisper(seed=1)` gives other weights; further keyword arguments go to `WhisperConfig`. The context is 1 s:
    `input_features` are [batch, 80, 100], and the encoder gives 50 tokens.
    """
    return functools.partial(build_whisper, tiny_processor.tokenizer)


@pytest.fixture
def readable_whisper(tiny_whisper):
    """A tiny Whisper whose frozen, tied token embeddings are far enough apart to spell any text."""

    def build(seed=0, vocab_size=None):
        model = tiny_whisper(seed=seed, init_std=0.1, **({} if vocab_size is None else {"vocab_size": vocab_size}))
        with torch.no_grad():
            model.model.decoder.embed_tokens.weight.mul_(10)
            model.model.decoder.layer_norm.weight.mul_(3)
        return model

    return build


@pytest.fixture
def inputs():
    """Inputs of two samples for `tiny_whisper()`."""
    generator = torch.Generator().manual_seed(0)
    return {
        "input_features": torch.randn(2, 80, 100, generator=generator),
        "decoder_input_ids": torch.randint(0, 200, (2, 6), generator=generator),
    }
