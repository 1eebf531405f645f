"""Transcripts of a prepared dataset."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..multilingual import check_model_languages
from .mode import evaluation_mode


@contextmanager
def _without_generation_warnings() -> Iterator[None]:
    """Hide transformers' warnings at each batch about arguments that Whisper's `generate` passes to itself."""
    logger, thread = logging.getLogger("transformers.generation.utils"), threading.get_ident()

    def is_shown(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno >= logging.ERROR

    logger.addFilter(is_shown)
    try:
        yield
    finally:
        logger.removeFilter(is_shown)


def transcribe(
    model: nn.Module,
    processor: Any,
    dataset: Any,
    language: str,
    *,
    task: str = "transcribe",
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    desc: str = "transcribing",
) -> list[str]:
    """
    Transcribe a prepared dataset greedily in a given language, with a progress bar.

    As in `generate`, the language chooses the adapter, or the base model if there is none. To use the active adapter
    for another language, set `model.base_model.route_by_language = False`.

    Args:
        model (`nn.Module`): A Whisper or a `PeftModel` around one, with the context of the dataset's features.
        processor (`WhisperProcessor`): Decodes the tokens.
        dataset: Examples with `input_features` [mels, frames], from [`prepare_dataset`].
        language (`str`): The spoken language: name or code, "catalan" or "ca".
        task (`str`, *optional*, defaults to `"transcribe"`): "transcribe" or "translate" (to English).
        batch_size (`int`, *optional*, defaults to 8): Utterances at a time.
        max_new_tokens (`int`, *optional*):
            Longest transcript in tokens, without the four of the prompt. By default the decoder's limit. A lower value
            saves time on a model that repeats itself.
        desc (`str`, *optional*, defaults to `"transcribing"`): Name of the progress bar.

    Returns:
        `list[str]`: one transcript an example, in order, without surrounding spaces.

    Raises:
        ValueError: the dataset is not prepared, or the model cannot be told a language.
    """
    check_model_languages(model)
    _check_prepared(dataset)
    if max_new_tokens is None:
        max_new_tokens = model.config.max_target_positions - 4

    def collate(examples: list[dict[str, Any]]) -> torch.Tensor:
        return torch.stack([torch.as_tensor(example["input_features"], dtype=model.dtype) for example in examples])

    transcripts: list[str] = []
    with (
        evaluation_mode(model),
        torch.inference_mode(),
        _without_generation_warnings(),
        tqdm(total=len(dataset), desc=desc, unit="utt") as progress,
    ):
        for input_features in DataLoader(dataset, batch_size=batch_size, collate_fn=collate):
            tokens = model.generate(
                input_features=input_features.to(model.device),
                language=language,
                task=task,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
            )
            transcripts += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
            progress.update(len(input_features))
    return transcripts


def _check_prepared(dataset: Any) -> None:
    """Raise a `ValueError` for a dataset that [`prepare_dataset`] has not made."""
    columns = getattr(dataset, "column_names", None)
    splits = dataset if isinstance(dataset, Mapping) else columns
    if isinstance(splits, Mapping):
        raise ValueError(
            f"the dataset is a dict of the splits {', '.join(splits)}: give one, dataset[{[*splits][-1]!r}]"
        )
    if columns is None and len(dataset):
        columns = list(dataset[0]) if isinstance(dataset[0], Mapping) else []
    if columns is not None and "input_features" not in columns:
        found = f"it has {', '.join(columns)}" if columns else f"its items are of type {type(dataset[0]).__name__}"
        raise ValueError(
            f"the dataset has no 'input_features', {found}: prepare it first, "
            "dataset, _ = prepare_dataset(dataset, processor, language)"
        )
