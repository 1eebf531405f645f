"""`peft-clsr transcribe` with PyTorch: a base Whisper and its language experts."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..inference.recordings import Recording
    from ..inference.subtitles import Transcript
    from .transcribe import Share, TranscribeRecordings


def check(arguments: argparse.Namespace, default: Callable[[str], Any]) -> None:
    """
    Set the device, if none is given.

    Raises:
        ValueError: an option is for another runtime, or the device cannot be used.
        ModuleNotFoundError: `--vad` lacks its extra.
    """
    import torch

    from ..data.pauses import load_silero

    if arguments.precision != default("precision"):
        raise ValueError("--precision is for --runtime onnx: take --dtype")
    if arguments.vad:
        load_silero()
    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {arguments.device} cannot be used: {error}") from error


def load(
    arguments: argparse.Namespace, languages: set[str | None], candidates: list[str], share: Share | None = None
) -> TranscribeRecordings:
    """
    Load the model with the experts of some languages.

    Args:
        arguments (`argparse.Namespace`): Those of the command.
        languages (`set[str]`): Tags of the languages of the recordings. `None`: also any other.
        candidates (`list[str]`): Tags of the languages to detect among; all if there is none.
        share ([`Share`], *optional*): Of this process, if there are several. "cuda" is then a GPU for each, by turns.

    Raises:
        ValueError: model or experts cannot be loaded, or detection cannot tell two candidates apart.
    """
    import torch
    from transformers.utils import logging

    from ..inference.experts import load_with_experts
    from ..inference.transcribe import prompts_of_candidates, transcribe_files
    from ..registration import register

    register()
    logging.set_verbosity_error()  # transformers warns of arguments that Whisper's generate passes to itself
    model, processor = load_with_experts(
        arguments.model, arguments.adapters, languages, getattr(torch, arguments.dtype)
    )
    prompts_of_candidates(model, candidates)  # raises its errors before the first recording
    device = arguments.device
    if share is not None:
        torch.set_num_threads(share.threads)
        if device == "cuda":
            device = f"cuda:{share.number % torch.cuda.device_count()}"
    model = model.to(device).eval()

    def transcribe(
        recordings: list[Recording], on_window: Callable[[Path, Transcript], None], warn: Callable[[str], None]
    ) -> Generator[tuple[Path, Transcript], None, None]:
        try:
            yield from transcribe_files(
                model,
                processor,
                [recording.path for recording in recordings],
                [recording.language for recording in recordings],
                candidates=candidates,
                route_by_prompt_language=arguments.route_by_prompt_language,
                task=arguments.task,
                batch_size=arguments.batch_size,
                num_beams=arguments.num_beams,
                vad=arguments.vad,
                show_progress=share is None,
                warn=warn,
                on_window=on_window,
            )
        except torch.cuda.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error

    return transcribe
