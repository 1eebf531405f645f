"""Measures a model on long recordings: held-out utterances, joined to recordings of about a minute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..data.rows import RowReader
from ..evaluation.error_rates import error_rates
from ..evaluation.mode import evaluation_mode
from ..evaluation.times import NEAR, summarize_times, time_errors
from ..inference.subtitles import Transcript
from ..inference.transcribe import transcribe_waveforms
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
        `dict`: as of `error_rates`, but `utterances` counts those that were joined; `recordings`; and the errors of
        the timestamps, as of `summarize_times`.
    """
    joined = JoinedRecordings(recordings, row_reader(recordings, processor, language, options.data, "eval"))
    batch_size = options.training.per_device_eval_batch_size
    transcripts = transcribe_joined(model, processor, joined, spoken, batch_size, f"{language}: {name}")
    rates = error_rates([one.text for one in transcripts], joined.texts, language=language)[language]
    errors = []
    for transcript, said in zip(transcripts, joined.times, strict=True):
        errors += time_errors([(one["start"], one["end"]) for one in transcript.segments], said)
    return {**rates, "utterances": joined.utterances, "recordings": len(joined), **summarize_times(errors)}


def format_times(rates: Mapping[str, Any]) -> str:
    """The errors of the timestamps as "times: median error 0.14 s, 93% of utterances within 0.5 s"."""
    median = rates["median_time_error"]
    error = "no times" if median is None else f"median error {median:.2f} s"
    return f"times: {error}, {rates['on_time']:.0%} of utterances within {NEAR:g} s"


class JoinedRecordings:
    """
    Recordings of about a minute, of utterances in their order with 0.4 s of silence after each.

    Args:
        recordings (`datasets.Dataset`): The utterances, undecoded.
        reader (`RowReader`): Reads them.

    Attributes:
        texts (`list[str]`): The transcript of each recording.
        times (`list[list[tuple[float, float]]]`): Start and end in seconds of the utterances of each recording.
        utterances (`int`): Number of utterances in all.
    """

    def __init__(self, recordings: Any, reader: RowReader) -> None:
        self._recordings, self._reader = recordings, reader
        seconds = [reader.seconds(row, index) + GAP for index, row in enumerate(recordings)]
        self._parts = divide(seconds, SECONDS)
        texts = recordings[reader.text_column][:]
        self.texts = [" ".join(texts[index].strip() for index in part) for part in self._parts]
        self.utterances = len(seconds)
        self.times = []
        for part in self._parts:
            lengths = np.array([seconds[index] for index in part])
            starts = np.cumsum(lengths) - lengths
            self.times.append([*zip(starts.tolist(), (starts + lengths - GAP).tolist(), strict=True)])

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


def transcribe_joined(
    model: Any, processor: Any, joined: JoinedRecordings, language: str, batch_size: int, desc: str
) -> list[Transcript]:
    """
    Transcribe joined recordings as `peft-clsr transcribe` does.

    Args:
        model (`WhisperForConditionalGeneration` or `PeftModel`): The model.
        processor (`WhisperProcessor`): Its processor.
        joined ([`JoinedRecordings`]): The recordings.
        language (`str`): As `generate` takes it. It chooses the adapter.
        batch_size (`int`): Recordings at a time.
        desc (`str`): Name of the progress bar.
    """
    rate = processor.feature_extractor.sampling_rate
    transcripts: list[Transcript] = []
    with evaluation_mode(model), tqdm(total=len(joined), desc=desc, unit="recording") as progress:
        for start in range(0, len(joined), batch_size):
            numbers = range(start, min(start + batch_size, len(joined)))
            waveforms = [joined.waveform(number, rate) for number in numbers]
            transcripts += transcribe_waveforms(model, processor, waveforms, [language] * len(waveforms))
            progress.update(len(numbers))
    return transcripts
