"""Converts a frozen Whisper to CTranslate2, and transcribes with faster-whisper to check it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, WhisperProcessor

from ..extras import require

PROMPT_TOKENS = 4
# One attempt without times, whatever the thresholds would say, as `transcribe` decodes with transformers.
ONE_ATTEMPT: dict[str, Any] = {
    "temperature": 0,
    "without_timestamps": True,
    "condition_on_previous_text": False,
    "compression_ratio_threshold": None,
    "log_prob_threshold": None,
    "no_speech_threshold": None,
}
MAX_NEW_TOKENS = 224  # faster-whisper allows the decoder's 448 positions, and CTranslate2 uses half of them


def save_whisper(model: PreTrainedModel | PeftModel, processor: WhisperProcessor, folder: Path) -> None:
    """
    Save a plain Whisper and its processor for transformers, with the files that a conversion needs.

    Args:
        model (`WhisperForConditionalGeneration`): From [`freeze_routing`].
        processor (`WhisperProcessor`): Its processor.
        folder (`Path`): The folder to create.
    """
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.feature_extractor.save_pretrained(folder)  # faster-whisper reads context and mel bins here


def convert(whisper_dir: Path, converted_dir: Path, quantization: str) -> None:
    """
    Convert a plain Whisper to CTranslate2.

    Args:
        whisper_dir (`Path`): From [`save_whisper`].
        converted_dir (`Path`): The folder to create.
        quantization (`str`): CTranslate2's: "float32", "float16", "int8", ...
    """
    converters = require("ctranslate2.converters")
    files = ["tokenizer.json", "preprocessor_config.json"]
    converter = converters.TransformersConverter(str(whisper_dir), copy_files=files)
    converter.convert(str(converted_dir), quantization=quantization)


def transcribe_with_faster_whisper(
    folder: Path, language: str, waveforms: Sequence[np.ndarray], max_new_tokens: int
) -> list[str]:
    """
    Transcribe recordings greedily with faster-whisper, as [`transcribe`] does with transformers.

    Args:
        folder (`Path`): A model of CTranslate2.
        language (`str`): Whisper's code.
        waveforms (`Sequence[np.ndarray]`): float32 [samples] of 16 kHz.
        max_new_tokens (`int`): Longest transcript in tokens, at most 224.
    """
    whisper = _short_context_whisper()(str(folder))
    texts = []
    for samples in tqdm(waveforms, desc="faster-whisper", unit="utt"):
        # faster-whisper pads features with zeros. transformers, also in training, pads the audio with silence.
        samples = np.pad(samples, (0, max(0, whisper.feature_extractor.n_samples - len(samples))))
        segments, _ = whisper.transcribe(
            samples,
            language=language,
            beam_size=1,
            max_new_tokens=2 * max_new_tokens - PROMPT_TOKENS,  # CTranslate2 halves this number, with the prompt
            **ONE_ATTEMPT,
        )
        texts.append("".join(segment.text for segment in segments).strip())
    return texts


def _short_context_whisper() -> type:
    class ShortContextWhisper(require("faster_whisper").WhisperModel):
        """
        faster-whisper for clips at a shorter context. It pads all features to 30 s, which such a model refuses.

        Not for longer audio: its times overlap then.
        """

        def encode(self, features: np.ndarray) -> Any:
            return super().encode(features[..., : self.feature_extractor.nb_max_frames])

    return ShortContextWhisper
