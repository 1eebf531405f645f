"""A model that is trained on windows without speech writes nothing in them."""

import numpy as np
import pytest
import torch
from conftest import SPECIAL_TOKENS, build_tokenizer
from helpers import noise
from transformers import WhisperFeatureExtractor, WhisperProcessor

from peft_clsr import encode_labels
from peft_clsr.data.labels import encode_segments
from peft_clsr.inference.transcribe import transcribe_waveforms

SILENCE, NOISE = np.zeros(16000, dtype=np.float32), noise(1)


@pytest.fixture
def processor():
    timestamps = [f"<|{position / 50:.2f}|>" for position in range(51)]
    return WhisperProcessor(WhisperFeatureExtractor(chunk_length=1), build_tokenizer([*SPECIAL_TOKENS, *timestamps]))


@pytest.fixture
def trained(tiny_whisper, processor):
    """A Whisper that hears "a" in noise and nothing in silence, with and without timestamps."""
    tokenizer = processor.tokenizer
    model = tiny_whisper(vocab_size=len(tokenizer))
    model.generation_config.begin_suppress_tokens = [tokenizer.eos_token_id]  # as in OpenAI's checkpoints
    model.generation_config.max_length = 8
    labels = [encode_labels(tokenizer, text, "ro") for text in ("", "a")]
    labels += [encode_segments(tokenizer, segments, "ro") for segments in ([], [(0.0, 1.0, "a")])]
    labels = torch.tensor([[*ids, *[-100] * (8 - len(ids))] for ids in labels])
    features = processor([SILENCE, NOISE] * 2, sampling_rate=16000, return_tensors="pt").input_features
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        model(input_features=features, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_with_timestamps_silence_has_no_segment(trained, processor):
    silent, spoken = transcribe_waveforms(trained, processor, [SILENCE, NOISE], ["ro", "ro"])
    assert silent.segments == [] and spoken.text == "a"


def test_without_timestamps_an_empty_transcript_must_be_allowed(trained, processor):
    """Whisper's generation config forbids <|endoftext|> as the first token, so it says something else."""
    features = processor([SILENCE, NOISE], sampling_rate=16000, return_tensors="pt").input_features

    def generated():
        tokens = trained.generate(input_features=features, language="ro", task="transcribe", max_new_tokens=3)
        return [processor.tokenizer.convert_ids_to_tokens(row) for row in tokens]

    assert generated()[0][0] != "<|endoftext|>"
    trained.generation_config.begin_suppress_tokens = []
    silent, spoken = generated()
    assert set(silent) == {"<|endoftext|>"}
    assert processor.tokenizer.convert_tokens_to_string(spoken[:2]).strip() == "a"
