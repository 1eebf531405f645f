"""Where the gates of an expert are open in a recording and its transcript."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import WhisperProcessor, WhisperTokenizer

from ..evaluation.normalization import leading_rate
from ..inference.generation import clsr_adapters, language_and_prompt
from ..inference.subtitles import Transcript
from ..inference.transcribe import audio_context, make_features
from ..whisper import POSITIONS_PER_SECOND, module_side


@dataclass
class Word:
    """
    A word of a transcript, or a character in languages without spaces between words.

    Args:
        text (`str`): With the space before it, if there is one.
        gate (`float`, *optional*): The mean gate of the decoder where it predicts the word, in [0, 1].
    """

    text: str
    gate: float | None = None


@dataclass
class Gates:
    """
    Args:
        positions (`np.ndarray`): float32 [positions of 20 ms], the mean gate of the encoder, in [0, 1].
        words (`list[Word]`): Those of the transcript.
    """

    positions: np.ndarray
    words: list[Word]


@torch.inference_mode()
def read_gates(
    model: PeftModel,
    processor: WhisperProcessor,
    waveform: np.ndarray,
    transcript: Transcript,
    on_window: Callable[[float], None] = lambda end: None,
) -> Gates:
    """
    Record the gates of a transcript's expert, in one forward for each window of the recording.

    The decoder reads the transcript, so a word's gates are those that it was written with, but for the borders of
    windows. A module counts as much as any other.

    Args:
        model (`PeftModel`): The model, in evaluation mode.
        processor (`WhisperProcessor`): Its processor.
        waveform (`np.ndarray`): float32 [samples] at the processor's rate.
        transcript ([`Transcript`]): The transcript by an expert.
        on_window (`Callable`, *optional*): Gets the end of each finished window, in seconds.
    """
    tuner: Any = model.base_model
    rate = processor.feature_extractor.sampling_rate
    prompt = _prompt(model, transcript.language)
    most = model.config.max_target_positions - len(prompt)
    positions = np.zeros(round(transcript.seconds * POSITIONS_PER_SECOND), dtype=np.float32)
    words: list[Word] = []
    for start, end, segments in windows(transcript, audio_context(model)):
        text = "".join(segment["text"] for segment in segments)
        tokens = processor.tokenizer(text, add_special_tokens=False).input_ids
        features, _ = make_features(
            [waveform[round(start * rate) : round(end * rate)]], processor.feature_extractor, audio_context(model)
        )
        ids = torch.tensor([[*prompt, *tokens[: most - 1]]], device=model.device)
        with tuner.record_gates() as recorded:
            model(
                input_features=features.to(model.device, model.dtype),
                decoder_input_ids=ids,
                adapter_names=[transcript.adapter],
            )
        encoder, decoder = (_mean(recorded, side) for side in ("encoder", "decoder"))
        first = round(start * POSITIONS_PER_SECOND)
        here = positions[first : round(end * POSITIONS_PER_SECOND)]
        here[:] = encoder[: len(here)]
        # The input before a token predicts it.
        words += split_words(processor.tokenizer, tokens, decoder[len(prompt) - 1 :].tolist(), transcript.language)
        on_window(end)
    return Gates(positions, words)


def windows(transcript: Transcript, context: float) -> Iterator[tuple[float, float, list[dict[str, Any]]]]:
    """
    Divide a recording into windows that cut no segment, as far as segments fit into the context.

    Args:
        transcript ([`Transcript`]): The transcript.
        context (`float`): The model's, in seconds.

    Yields:
        `tuple[float, float, list[dict]]`: start and end in seconds, and the segments.
    """
    start, left = 0.0, list(transcript.segments)
    while start < transcript.seconds:
        end = min(start + context, transcript.seconds)
        inside = [segment for segment in left if segment["end"] <= end + 1e-6]
        left = left[len(inside) :]
        if left and inside:
            end = inside[-1]["end"]
        elif left and left[0]["start"] > start:
            end = min(end, left[0]["start"])
        elif left:  # longer than the context
            inside = [left.pop(0)]
        yield start, end, inside
        start = end


def split_words(
    tokenizer: WhisperTokenizer, tokens: Sequence[int], gates: Sequence[float], language: str
) -> list[Word]:
    """
    Divide tokens into words, each with the mean of its tokens' gates.

    Args:
        tokenizer (`WhisperTokenizer`): The processor's.
        tokens (`Sequence[int]`): Tokens of text.
        gates (`Sequence[float]`): The gate of each token, in [0, 1]. Further tokens have none.
        language (`str`): The tag of the language.
    """
    words: list[tuple[str, list[float]]] = []
    pending: list[int] = []
    for index, token in enumerate(tokens):
        pending.append(token)
        text = tokenizer.decode(pending)
        if text.endswith("\ufffd") and index + 1 < len(tokens):
            continue  # a part of a character
        own = [float(gate) for gate in gates[index + 1 - len(pending) : index + 1]]
        pending = []
        if words and not text[:1].isspace() and leading_rate(language) == "wer":
            before, values = words[-1]
            words[-1] = before + text, values + own
        else:
            words.append((text, own))
    return [Word(text, sum(values) / len(values) if values else None) for text, values in words]


def _prompt(model: PeftModel, language: str) -> list[int]:
    """The tokens before a transcript."""
    config = model.generation_config
    _, code = language_and_prompt(language, config.lang_to_id, clsr_adapters(model), None)
    return [
        model.config.decoder_start_token_id,
        config.lang_to_id[f"<|{code}|>"],
        config.task_to_id["transcribe"],
        config.no_timestamps_token_id,
    ]


def _mean(recorded: dict[str, torch.Tensor], side: str) -> np.ndarray:
    """The mean over the modules of a side, float32 [tokens]; zeros if none of them is routed."""
    gates = [gate[0] for name, gate in recorded.items() if module_side(name) == side]
    return torch.stack(gates).mean(0).float().cpu().numpy() if gates else np.zeros(10**4, dtype=np.float32)
