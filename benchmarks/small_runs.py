"""What measurements of many small trainings share: recordings, experts, their training, and a file of results."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel, get_peft_model
from transformers import WhisperForConditionalGeneration

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
    transcribe,
)


class Results:
    """
    A file with a line of JSON for each finished run.

    Args:
        path (`Path`): The file. It is made with the first line.
        keys (`tuple[str, ...]`): The values that tell a run from others.
    """

    def __init__(self, path: Path, keys: tuple[str, ...]) -> None:
        self.path, self.keys = path, keys

    def find(self, run: dict[str, Any]) -> dict[str, Any] | None:
        """The results of a run, if it is in the file."""
        if not self.path.is_file():
            return None
        rows = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
        return next((row for row in rows if all(row[name] == run[name] for name in self.keys)), None)

    def add(self, row: dict[str, Any]) -> None:
        """Append the results of a run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


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
