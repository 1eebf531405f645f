"""Shared by measurements of many small trainings: recordings, experts, their training, and options."""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel, get_peft_model
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.utils import logging as transformers_logging

from benchmarks.timing import machine
from examples.demo.fetch import STAMPS_PACKAGE, fetch_package, fetch_whisper, make_dataset
from peft_clsr import (
    CLSRConfig,
    DataCollatorSpeechSeq2SeqWithPadding,
    DistillationTrainer,
    DistillationTrainingArguments,
    error_rates,
    load_recordings,
    prepare_dataset,
    save_language,
    transcribe,
)


def make_parser(doc: str, name: str, *, language: str, steps: int, rank: int) -> argparse.ArgumentParser:
    """
    The options of a measurement.

    Args:
        doc (`str`): The docstring of its module; its first paragraph is shown.
        name (`str`): Its name, for its file of results and its folder.
        language (`str`), steps (`int`), rank (`int`): Defaults.
    """
    parser = argparse.ArgumentParser(
        description=doc.strip().split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--cache_dir", type=Path, default=Path(".cache"), help="folder to fetch into")
    add("--student", default=".cache/whisper-base", help="Whisper to improve: folder or Hub id")
    add("--language", default=language, help="language to train")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--steps", type=int, default=steps, help="steps of each run")
    add("--held_out", type=int, default=100, help="recordings to measure on")
    add("--rank", type=int, default=rank, help="rank of the experts")
    add("--learning_rate", type=float, default=2e-3)
    add("--bf16", action="store_true", help="train and measure in bfloat16")
    add("--threads", type=int, default=1)
    add("--output", type=Path, default=Path(f"benchmarks/results/{name}.jsonl"))
    add("--work_dir", type=Path, default=Path(f"runs/{name}"), help="folder of experts and other work")
    return parser


def prepare(options: argparse.Namespace, *languages: str) -> tuple[Any, datasets.Dataset]:
    """Fetch what is needed. Returns the processor, and the recordings of `options.language` to measure on."""
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    logging.getLogger("peft_clsr").setLevel(logging.ERROR)
    for language in languages:
        fetch(options.cache_dir, language)
    held_out = recordings(options.cache_dir, options.language, "test")
    held_out = held_out.select(range(min(len(held_out), options.held_out)))
    return WhisperProcessor.from_pretrained(options.student), held_out


def fetch(cache: Path, language: str) -> None:
    """Write whisper-base and the recordings of a language into the cache, if they are not there."""
    fetch_whisper(cache / "whisper-base")
    dataset = cache / f"tuxpaint-{language}"
    if not dataset.is_dir():
        fetch_package(STAMPS_PACKAGE, cache / STAMPS_PACKAGE)
        make_dataset(cache / STAMPS_PACKAGE / "usr/share/tuxpaint/stamps", language, dataset)


def recordings(cache: Path, language: str, split: str) -> datasets.Dataset:
    """The recordings of a split, undecoded."""
    return load_recordings(str(cache / f"tuxpaint-{language}"), language, split)


def new_expert(language: str, student: str, **settings: Any) -> PeftModel:
    """A Whisper in float32 with a new expert; `settings` are those of `CLSRConfig`."""
    whisper = WhisperForConditionalGeneration.from_pretrained(student, dtype=torch.float32)
    return get_peft_model(whisper, CLSRConfig(language=language, **settings), adapter_name=language)


def train(
    model: PeftModel, processor: Any, windows: Any, language: str, *, steps: int, **settings: Any
) -> list[dict[str, float]]:
    """Train on windows. Returns the log of losses. `settings` are those of `DistillationTrainingArguments`."""
    if steps == 0:
        return []
    with tempfile.TemporaryDirectory() as folder:
        arguments = DistillationTrainingArguments(
            folder,
            max_steps=steps,
            warmup_steps=0.1,
            adam_beta2=0.98,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=5,
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        collator = DataCollatorSpeechSeq2SeqWithPadding(processor, language=language)
        trainer = DistillationTrainer(model=model, args=arguments, train_dataset=windows, data_collator=collator)
        trainer.train()
    return [{name: entry[name] for name in ("step", "loss")} for entry in trainer.state.log_history if "loss" in entry]


def save_expert(model: PeftModel, language: str, folder: Path) -> None:
    """Save an expert into a folder, whole or not at all."""
    with tempfile.TemporaryDirectory() as scratch:
        saved = save_language(model, scratch, language)
        folder.parent.mkdir(parents=True, exist_ok=True)
        saved.rename(folder)


def measure(
    model: PeftModel, processor: Any, held_out: datasets.Dataset, language: str, *, bf16: bool, desc: str
) -> dict[str, Any]:
    """Error rates (fractions) on recordings, and the machine."""
    if bf16:
        model.to(torch.bfloat16)
    prepared, _ = prepare_dataset(held_out, processor, language)
    texts = transcribe(model, processor, prepared, language, batch_size=10, max_new_tokens=64, desc=desc)
    rates = error_rates(texts, prepared["text"], language=language)[language]
    found = {name: rates[name] for name in ("wer", "cer", "utterances")}
    return found | {"machine": machine("bfloat16" if bf16 else "float32")}
