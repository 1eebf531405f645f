"""How sure a model is of a transcript."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import numpy as np
import torch
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from ...data.labels import encode_segments
from ...inference.generation import clsr_adapters, language_and_prompt
from ...inference.transcribe import make_features
from ...languages.adapters import inference_adapter
from ...tuner.adapter_names import BASE
from ...tuner.samples import use_adapter_per_sample
from ...whisper import POSITIONS_PER_SECOND

SCORES = ("log_probability", "compression_ratio", "no_speech_probability")


def score_segments(
    model: Any,
    processor: Any,
    waveform: np.ndarray,
    segments: Sequence[dict[str, Any]],
    language: str,
    batch_size: int = 8,
) -> list[dict[str, float]]:
    """
    Score the segments of a recording's transcript by the model that wrote it, or by another one.

    The model hears windows of whole segments, up to its context, and reads the transcript (teacher forcing). So all
    scores are exact, however the transcript was found, and cost one pass.

    Args:
        model (`WhisperForConditionalGeneration` or `PeftModel`): The model, in evaluation mode.
        processor (`WhisperProcessor`): Its processor.
        waveform (`np.ndarray`): float32 [samples] at the processor's rate.
        segments (`Sequence[dict]`): "start" and "end" in seconds, and "text", in order.
        language (`str`): As `generate` takes it. It chooses the adapter.
        batch_size (`int`, *optional*, defaults to 8): Windows at a time.

    Returns:
        `list[dict]`: for each segment, "log_probability": the mean log-probability of its text's tokens, in nats;
        "compression_ratio": bytes of the text of its window, divided by their number after zlib; and
        "no_speech_probability": that of Whisper's token for no speech, in its window. A text that the decoder's limit
        cuts off has the log-probability NaN.
    """
    extractor, tokenizer = processor.feature_extractor, processor.tokenizer
    rate, context = extractor.sampling_rate, model.config.max_source_positions / POSITIONS_PER_SECOND
    adapters = clsr_adapters(model)
    tag, prompt = language_and_prompt(language, model.generation_config.lang_to_id, adapters, None)
    adapter = inference_adapter(adapters, tag, None) or BASE
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    no_speech = _no_speech_token(tokenizer, model.generation_config)
    scores: list[dict[str, float]] = []
    windows = _windows(segments, context)
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        starts = [window[0]["start"] for window in batch]
        pieces = [
            waveform[round(start * rate) : round((start + context) * rate)][: extractor.n_samples] for start in starts
        ]
        features, _ = make_features(pieces, extractor, context)
        labels = [
            encode_segments(
                tokenizer,
                [(one["start"] - start, min(one["end"] - start, context), one["text"]) for one in window],
                prompt,
            )
            for window, start in zip(batch, starts, strict=True)
        ]
        limit = model.config.max_target_positions
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(one[:limit]) for one in labels], True, -100)
        inputs = shift_tokens_right(padded, model.config.pad_token_id, model.config.decoder_start_token_id)
        routed = use_adapter_per_sample(base, base.clsr_routing, [adapter] * len(batch)) if adapters else nullcontext()
        with torch.inference_mode(), routed:
            logits = model(
                input_features=features.to(model.device, model.dtype), decoder_input_ids=inputs.to(model.device)
            ).logits.float()
        chosen = logits.log_softmax(-1).gather(-1, padded.clamp(min=0)[..., None].to(logits.device))[..., 0].cpu()
        silence = logits[:, 0].softmax(-1)[:, no_speech].tolist()
        first_timestamp = tokenizer.convert_tokens_to_ids("<|0.00|>")
        for window, row, values, probability in zip(batch, padded.tolist(), chosen, silence, strict=True):
            text = "".join(one["text"] for one in window).strip()
            means = _means_of_texts(row, values, first_timestamp, tokenizer.eos_token_id)
            for mean in (means + [float("nan")] * len(window))[: len(window)]:
                scores.append(dict(zip(SCORES, (mean, compression_ratio(text), probability), strict=True)))
    return scores


def compression_ratio(text: str) -> float:
    """Bytes of a text, divided by their number after zlib: high for a text that repeats itself. 0 for an empty one."""
    content = text.encode()
    return len(content) / len(zlib.compress(content)) if content else 0.0


def _windows(segments: Sequence[dict[str, Any]], context: float) -> list[list[dict[str, Any]]]:
    """Segments in groups that fit into the context; a longer one is alone, and its end is not heard."""
    windows: list[list[dict[str, Any]]] = []
    for segment in segments:
        if windows and segment["end"] - windows[-1][0]["start"] <= context:
            windows[-1].append(segment)
        else:
            windows.append([segment])
    return windows


def _means_of_texts(row: list[int], values: torch.Tensor, first_timestamp: int, end: int) -> list[float]:
    """The mean of the values of each text between timestamps, after the language and the task."""
    is_text = [2 <= place and 0 <= token < first_timestamp and token != end for place, token in enumerate(row)]
    runs = [list(places) for key, places in groupby(range(len(row)), key=is_text.__getitem__) if key]
    return [float(values[places].mean()) for places in runs]


def _no_speech_token(tokenizer: Any, generation_config: Any) -> int:
    """The id of <|nospeech|>, which older tokenizers call <|nocaptions|>."""
    for token in ("<|nospeech|>", "<|nocaptions|>"):
        token_id = tokenizer.convert_tokens_to_ids(token)
        if token_id is not None and token_id != tokenizer.unk_token_id:
            return token_id
    # OpenAI's vocabularies have it before <|notimestamps|>.
    return generation_config.no_timestamps_token_id - 1
