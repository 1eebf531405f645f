"""Measures a model on long recordings: held-out utterances, joined to recordings of about a minute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.rows import RowReader
from ..evaluation.error_rates import error_rates
from ..evaluation.mode import evaluation_mode
from ..inference.transcribe import make_features
from ..whisper import POSITIONS_PER_SECOND
from .train_data import row_reader
from .train_options import TrainOptions

SECONDS = 60.0  # of a recording, about
GAP = 0.4  # seconds of silence after each utterance


def measure_joined(
    model: Any, processor: Any, recordings: Any, language: str, spoken: str, options: TrainOptions, name: str
) -> dict[str, Any]:
    """
    Error rates of a model on joined recordings.

    Args:
        model (`WhisperForConditionalGeneration` or `PeftModel`): The model, at its whole context.
        processor (`WhisperProcessor`): Its processor.
        recordings (`datasets.Dataset`): Undecoded utterances that can be used, with their transcripts.
        language (`str`): The tag.
        spoken (`str`): The language for `generate`: the tag, or that of the prompt for a model without experts.
        options (`TrainOptions`): Say which columns, and how many recordings at a time.
        name (`str`): The model's, for the progress bar.

    Returns:
        `dict`: as of `error_rates`, but `utterances` counts those that were joined; and `recordings`.
    """
    joined = JoinedRecordings(recordings, row_reader(recordings, processor, language, options.data))
    batch_size = options.training.per_device_eval_batch_size
    transcripts = transcribe_joined(model, processor, joined, spoken, batch_size, f"{language}: {name}")
    rates = error_rates(transcripts, joined.texts, language=language)[language]
    return {**rates, "utterances": joined.utterances, "recordings": len(joined)}


class JoinedRecordings:
    """
    Recordings of about a minute, of utterances in their order with 0.4 s of silence after each.

    Args:
        recordings (`datasets.Dataset`): The utterances, undecoded.
        reader (`RowReader`): Reads them.

    Attributes:
        texts (`list[str]`): The transcript of each recording.
        utterances (`int`): Number of utterances in all.
    """

    def __init__(self, recordings: Any, reader: RowReader) -> None:
        self._recordings, self._reader = recordings, reader
        seconds = [reader.seconds(row, index) + GAP for index, row in enumerate(recordings)]
        self._parts = divide(seconds, SECONDS)
        texts = recordings[reader.text_column][:]
        self.texts = [" ".join(texts[index].strip() for index in part) for part in self._parts]
        self.utterances = len(seconds)

    def __len__(self) -> int:
        return len(self._parts)

    def waveform(self, recording: int, rate: int) -> np.ndarray:
        """float32 [samples] of a recording at a rate in Hz."""
        silence = np.zeros(round(GAP * rate), dtype=np.float32)
        pieces = []
        for index in self._parts[recording]:
            pieces += [self._reader.samples(self._recordings[index], index, rate), silence]
        return np.concatenate(pieces)


def divide(seconds: Sequence[float], about: float) -> list[list[int]]:
    """Divide items in their order into parts of about so many seconds each; at least one part."""
    number = max(1, round(sum(seconds) / about))
    middles = np.cumsum(seconds) - np.asarray(seconds) / 2
    parts: list[list[int]] = [[] for _ in range(number)]
    for index, middle in enumerate(middles):
        parts[int(middle / sum(seconds) * number)].append(index)
    return [part for part in parts if part]


@torch.inference_mode()
def transcribe_joined(
    model: Any, processor: Any, joined: JoinedRecordings, language: str, batch_size: int, desc: str
) -> list[str]:
    """
    Transcribe joined recordings greedily, window by window: each window begins where Whisper's timestamps say.

    Args:
        model (`WhisperForConditionalGeneration` or `PeftModel`): The model.
        processor (`WhisperProcessor`): Its processor.
        joined ([`JoinedRecordings`]): The recordings.
        language (`str`): As `generate` takes it. It chooses the adapter.
        batch_size (`int`): Recordings at a time.
        desc (`str`): Name of the progress bar.

    Returns:
        `list[str]`: one transcript a recording.
    """
    extractor = processor.feature_extractor
    context = model.config.max_source_positions / POSITIONS_PER_SECOND
    transcripts: list[str] = []
    with evaluation_mode(model), tqdm(total=len(joined), desc=desc, unit="recording") as progress:
        for start in range(0, len(joined), batch_size):
            numbers = range(start, min(start + batch_size, len(joined)))
            waveforms = [joined.waveform(number, extractor.sampling_rate) for number in numbers]
            features, mask = make_features(waveforms, extractor, context)
            tokens = model.generate(
                input_features=features.to(model.device, model.dtype),
                attention_mask=mask.to(model.device),
                language=language,
                task="transcribe",
                return_timestamps=True,
                do_sample=False,
                num_beams=1,
            )
            transcripts += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
            progress.update(len(numbers))
    return transcripts
