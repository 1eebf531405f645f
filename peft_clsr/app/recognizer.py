"""Transcribes a recording with the base model and with the expert of its language."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from ..data.audio import TruncatedAudioError, read_audio
from ..inference.experts import load_with_experts
from ..inference.generation import clsr_adapters, language_and_prompt
from ..inference.subtitles import Transcript
from ..inference.transcribe import transcribe_waveforms, with_detected_languages
from ..languages.adapters import adapter_languages, inference_adapter
from ..languages.tags import language_name, language_tag
from .gates import Gates, read_gates

Progress = Callable[[float, str], None]  # gets the finished part, in [0, 1], and what is done


@dataclass
class Result:
    """
    Args:
        base ([`Transcript`]): By the base model.
        expert ([`Transcript`], *optional*): By the expert; `None` if there is none for the language.
        gates ([`Gates`], *optional*): Those of the expert.
    """

    base: Transcript
    expert: Transcript | None
    gates: Gates | None


class Recognizer:
    """
    A Whisper with its experts. Call it in one thread at a time: the base model is the same model with its experts off.

    Args:
        model (`str`): The base model: Hub id or folder.
        adapters (`Sequence[str]`): As in [`load_with_experts`].
        languages (`Sequence[str]`): The only languages to offer, tags or names. Empty for all.
        max_seconds (`float`): Longest recording.

    Raises:
        ValueError: as [`load_with_experts`], or a language is none.
    """

    def __init__(self, model: str, adapters: Sequence[str], languages: Sequence[str], max_seconds: float) -> None:
        transformers_logging.set_verbosity_error()  # as in `peft-clsr transcribe`
        self.only = [language_tag(language) for language in languages]
        self.max_seconds = max_seconds
        loaded, self.processor = load_with_experts(model, adapters, self.only or [None])
        self.model = loaded.eval()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(device)  # type: ignore[arg-type]
        self.rate = self.processor.feature_extractor.sampling_rate
        self.adapters = clsr_adapters(self.model)

    def expert_languages(self) -> list[str]:
        """Tags of the languages that have experts."""
        return sorted({tag for tag in adapter_languages(self.adapters).values() if tag})

    def languages(self) -> list[tuple[str, str]]:
        """Names and tags of the languages to choose from, those with experts first."""
        experts = self.expert_languages()
        known = sorted(token[2:-2] for token in self.model.generation_config.lang_to_id)
        tags = self.only or [*experts, *(code for code in known if code not in experts)]
        return [(language_name(tag) + (" · expert" if self._adapter(tag) else ""), tag) for tag in tags]

    def read(self, path: Path, warn: Callable[[str], None]) -> np.ndarray:
        """
        Read a recording. One that is cut off is read as far as it goes, with a warning.

        Returns:
            `np.ndarray`: float32 [samples] at the processor's rate.

        Raises:
            ValueError: it cannot be read, or is too long. The message has the file's name, not its folder.
        """
        try:
            audio = {"bytes": path.read_bytes(), "path": path.name}
        except OSError as error:  # its message has the folder
            raise ValueError(f"{path.name} cannot be read ({error.strerror}): give the file again") from error
        try:
            waveform = read_audio(audio, self.rate, end=self.max_seconds + 1)
        except TruncatedAudioError as error:
            warn(str(error))
            waveform = error.samples
        if len(waveform) > self.max_seconds * self.rate:
            raise ValueError(
                f"{path.name} is longer than {self.max_seconds:g} s: give a part of it, or start the page "
                "with a larger --max_seconds"
            )
        return waveform

    def transcribe(self, waveform: np.ndarray, language: str | None, progress: Progress) -> Result:
        """
        Transcribe a waveform with the base model, and with the expert of its language if there is one.

        Args:
            waveform (`np.ndarray`): Of [`read`].
            language (`str`, *optional*): A tag of [`languages`]. `None` detects it.
            progress (`Callable`): Is told what is done, after each window of the recording.

        Raises:
            ValueError: languages that sound alike cannot be detected.
        """
        if language is None:
            progress(0.0, "Detecting the language")
            (language,) = with_detected_languages(self.model, self.processor, [waveform], [None], self.only)
        _, code = language_and_prompt(language, self.model.generation_config.lang_to_id, self.adapters, None)
        if self._adapter(language) is None:
            return Result(self._run(waveform, code, progress, "Base model"), None, None)
        with self.model.disable_adapter():
            base = replace(self._run(waveform, code, progress, "Base model"), adapter=None)
        expert = self._run(waveform, language, progress, "Expert")
        seconds = expert.seconds
        gates = read_gates(
            self.model,
            self.processor,
            waveform,
            expert,
            lambda end: progress(end / seconds, _heard("Gates", end, seconds)),
        )
        return Result(base, expert, gates)

    def _adapter(self, tag: str) -> str | None:
        return inference_adapter(self.adapters, tag, active=None) if self.adapters else None

    def _run(self, waveform: np.ndarray, language: str, progress: Progress, who: str) -> Transcript:
        seconds = len(waveform) / self.rate

        def on_window(index: int, heard: Transcript) -> None:
            end = heard.segments[-1]["end"] if heard.segments else 0.0
            progress(end / seconds, _heard(who, end, seconds))

        progress(0.0, _heard(who, 0.0, seconds))
        (transcript,) = transcribe_waveforms(self.model, self.processor, [waveform], [language], on_window=on_window)
        return transcript


def _heard(who: str, end: float, seconds: float) -> str:
    return f"{who}: {end:.0f} of {seconds:.0f} s"
