"""Seconds of speech trained on per second of computing: single utterances at 30 s, at a cut context, and packed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import get_peft_model
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from peft_clsr import (
    CLSRConfig,
    DataCollatorSpeechSeq2SeqWithPadding,
    DistillationTrainer,
    DistillationTrainingArguments,
    pack_utterances,
    prepare_dataset,
    set_audio_context,
)

from .timing import time_steps
from .training_steps import trainer_settings, training_steps


def load_recordings(path: str) -> datasets.Dataset:
    """The recordings of a folder with `train/metadata.csv`: the table, with a column `audio`."""
    folder = Path(path) / "train"
    table = datasets.Dataset.from_csv(str(folder / "metadata.csv"))
    return table.add_column("audio", [str(folder / name) for name in table["file_name"]])


def prepare(recordings: datasets.Dataset, processor: Any, num_examples: int) -> datasets.Dataset:
    """The first examples that fit, as features and labels."""
    dataset, _ = prepare_dataset(recordings, processor)
    if len(dataset) < num_examples:
        raise SystemExit(
            f"the dataset has {len(dataset)} examples that fit, {num_examples} are needed: use fewer --rounds"
        )
    return dataset.select(range(num_examples))


def measure_speech_rates(
    student: str, path: str, cut_seconds: float, batch_size: int, rounds: int, clock: Callable[[], float]
) -> dict[str, dict[str, Any]]:
    """
    Train low-rank experts in three ways, a step each in turn. Packed features are computed within the step.

    Args:
        student (`str`): Whisper: folder or Hub id.
        path (`str`): Folder of recordings.
        cut_seconds (`float`): The cut context.
        batch_size (`int`): Utterances of a step at the cut context. At the whole one, a step hears one window.
        rounds (`int`): Timed steps of each way.
        clock (`Callable`): Returns seconds.

    Returns:
        `dict`: for each way `batch` (what a step hears), `seconds` (mean of a step), `speech` (mean seconds of speech
        in a step) and `speech_per_second`.
    """
    whole, cut = (WhisperProcessor.from_pretrained(student) for _ in range(2))
    set_audio_context(None, cut, cut_seconds)
    recordings = load_recordings(path)
    steps = rounds + 1  # one to warm up
    context = whole.feature_extractor.chunk_length
    # More than fit the cut context are taken, as some are longer.
    some = recordings.select(range(min(len(recordings), 2 * steps * batch_size)))
    packed = pack_utterances(recordings, whole)
    single, short = prepare(some, whole, steps), prepare(some, cut, steps * batch_size)
    ways = {
        f"one by one, padded to {context} s": (single, whole, 1, _speech(single)),
        f"one by one, cut to {cut_seconds:g} s": (short, cut, batch_size, batch_size * _speech(short)),
        f"packed to {context} s": (packed, whole, 1, packed.seconds / len(packed)),
    }
    with tempfile.TemporaryDirectory() as folder:
        calls = {}
        for name, (dataset, processor, batch, _) in ways.items():
            trainer = _trainer(student, dataset, processor, batch, folder, None if processor is whole else cut_seconds)
            calls[name] = training_steps(trainer).__next__
        time_steps(calls, 1)
        times = time_steps(calls, rounds, clock)
    rates = {}
    for name, (_, _, batch, speech) in ways.items():
        seconds = float(np.mean(times[name]))
        what = "a window" if name.startswith("packed") else f"{batch} utterance{'s' * (batch > 1)}"
        rates[name] = {"batch": what, "seconds": seconds, "speech": speech, "speech_per_second": speech / seconds}
    return rates


def _speech(dataset: datasets.Dataset) -> float:
    """Mean seconds of speech of an example: its frames of 10 ms that are no padding."""
    return float(np.mean([mask.sum() for mask in dataset["attention_mask"]])) / 100


def _trainer(
    student: str, dataset: Any, processor: Any, batch_size: int, folder: str, cut_seconds: float | None
) -> DistillationTrainer:
    base = WhisperForConditionalGeneration.from_pretrained(student, dtype=torch.float32)
    language = dataset.languages[0] if hasattr(dataset, "languages") else dataset["language"][0]
    config = CLSRConfig(language=language, expert_rank=32, max_audio_seconds=cut_seconds)
    model = get_peft_model(base, config, adapter_name=language)
    return DistillationTrainer(
        model=model,
        args=DistillationTrainingArguments(**trainer_settings(folder, batch_size)),
        train_dataset=dataset,
        data_collator=DataCollatorSpeechSeq2SeqWithPadding(processor),
        processing_class=processor,
    )
