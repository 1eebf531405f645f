"""The expert and the recordings of an export, checked and loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import PeftModel
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from ..checkpoints.checks import check_adapter_folder
from ..data.dataset import prepare_dataset
from ..data.segments import read_row
from ..data.tables import load_recordings
from ..evaluation.error_rates import error_rates
from ..evaluation.transcripts import transcribe
from ..files import check_output_folder
from ..hub.pull import load_language
from ..languages.adapters import adapter_of_language
from ..languages.tags import language_tag, prompt_code
from ..sources import check_source, check_whisper
from ..tuner.config import CLSRConfig
from ..whisper import POSITIONS_PER_SECOND, set_audio_context
from .table import markdown_table, rate_cells

FEW_RECORDINGS = 100
MAX_NEW_TOKENS = 224  # half of the decoder's positions, as OpenAI's Whisper and CTranslate2 have it


@dataclass
class ExportInputs:
    """
    The model, the recordings and the arguments that all formats start from.

    Args:
        arguments (`argparse.Namespace`): Those of the command.
        code (`str`): The language's tag.
        prompt (`str`): Whisper's code of the language in the prompt.
        model (`PeftModel`): The base with the adapter, in float32.
        config (`CLSRConfig`): That of the adapter.
        processor (`WhisperProcessor`): At the model's context.
        recordings (`datasets.Dataset`): As they were loaded.
        dataset (`datasets.Dataset`): Features, labels and texts of those that can be used.
    """

    arguments: argparse.Namespace
    code: str
    prompt: str
    model: PeftModel
    config: CLSRConfig
    processor: WhisperProcessor
    recordings: datasets.Dataset
    dataset: datasets.Dataset

    @property
    def seconds(self) -> float:
        """The context of the model."""
        return self.model.config.max_source_positions / POSITIONS_PER_SECOND

    @property
    def limits(self) -> dict[str, Any]:
        """Arguments of `transcribe` and `freeze_routing`."""
        return {"batch_size": self.arguments.batch_size, "max_new_tokens": self.arguments.max_new_tokens}

    def load_split(self, split: str, limit: int | None = None) -> datasets.Dataset:
        """Recordings of a split of the dataset."""
        return _load_recordings(self.arguments, self.code, split, limit)

    def waveforms(self) -> list[np.ndarray]:
        """The recordings of `dataset`, float32 [samples] of 16 kHz."""
        rows = self.recordings.select(self.dataset["index"])
        return [read_row(row, self.arguments.audio_column, 16000) for row in rows]

    def transcribe(self, model: Any) -> list[str]:
        """Transcribe `dataset` greedily with a model of transformers that has no gates."""
        return transcribe(model, self.processor, self.dataset, self.prompt, **self.limits)

    def rates(self, transcripts: Sequence[str]) -> dict[str, Any]:
        """Error rates of transcripts of `dataset`."""
        return error_rates(transcripts, self.dataset["text"], language=self.code)[self.code]

    def rates_table(self, rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
        """Error rates in percent as a Markdown table, and how many recordings they rest on."""
        cells = [[name, *rate_cells(rates, self.code)] for name, rates in rows]
        count = len(self.dataset)
        few = ": with so few, differences of a few percent are chance" if count < FEW_RECORDINGS else ""
        return f"{markdown_table(['model', 'WER %', 'CER %'], cells)}\n\nMeasured on {count} recordings{few}."


def load_inputs(
    arguments: argparse.Namespace, check: Callable[[argparse.Namespace, PeftModel, CLSRConfig], None]
) -> ExportInputs:
    """
    Check the arguments that all formats have, then load the model and the recordings.

    Args:
        arguments (`argparse.Namespace`): Those of the command.
        check (`Callable`): Called with arguments, model and the adapter's config, before features are computed. It
            raises a `ValueError` for what the format cannot be.

    Raises:
        ValueError: an argument is wrong; there is no such model, adapter, dataset or language.
    """
    code = language_tag(arguments.language)
    _check(arguments, code)
    recordings = _load_recordings(arguments, code, arguments.split, arguments.max_samples)
    model = _load_model(arguments, code)
    config: Any = model.peft_config[adapter_of_language(model.peft_config, code)]
    check(arguments, model, config)
    prompt = config.prompt_language or prompt_code(code)
    processor = WhisperProcessor.from_pretrained(arguments.base)
    set_audio_context(None, processor, model.config.max_source_positions / POSITIONS_PER_SECOND)
    columns = {"audio_column": arguments.audio_column, "text_column": arguments.text_column}
    dataset, _ = prepare_dataset(recordings, processor, code, prompt_language=prompt, **columns)
    return ExportInputs(arguments, code, prompt, model, config, processor, recordings, dataset)


def _check(arguments: argparse.Namespace, code: str) -> None:
    output_dir = arguments.output_dir
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"--output_dir {output_dir} is not an empty folder: give another one, or remove it")
    check_output_folder(output_dir, "--output_dir")
    for name in ("batch_size", "max_samples"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}, expected at least 1")
    if not 1 <= arguments.max_new_tokens <= MAX_NEW_TOKENS:
        raise ValueError(f"--max_new_tokens is {arguments.max_new_tokens}, expected 1 to {MAX_NEW_TOKENS}")
    check_whisper(arguments.base, "--base")
    check_source(arguments.adapter, "--adapter", "an adapter")
    check_source(arguments.dataset.replace("{language}", code), "--dataset", "a dataset", is_dataset=True)
    if Path(arguments.adapter).is_dir():
        try:
            check_adapter_folder(arguments.adapter)
        except ValueError as error:
            raise ValueError(f"--adapter {arguments.adapter} cannot be used: {error}") from error


def _load_recordings(
    arguments: argparse.Namespace, code: str, split: str, limit: int | None = None
) -> datasets.Dataset:
    return load_recordings(
        arguments.dataset,
        code,
        split,
        config=arguments.dataset_config,
        audio_column=arguments.audio_column,
        text_column=arguments.text_column,
        file_column=arguments.file_column,
        limit=limit,
    )


def _load_model(arguments: argparse.Namespace, code: str) -> PeftModel:
    """The base model with the adapter, in float32."""
    base = WhisperForConditionalGeneration.from_pretrained(arguments.base, dtype=torch.float32)
    if not Path(arguments.adapter).is_dir():
        if arguments.full_context:
            raise ValueError("--full_context needs the adapter in a folder: download it, and give the folder")
        return load_language(base, arguments.adapter, code)
    config = CLSRConfig.from_pretrained(arguments.adapter)
    if arguments.full_context:
        config.max_audio_seconds = None
    return PeftModel.from_pretrained(base, arguments.adapter, adapter_name=config.language or code, config=config)
