"""A replica of the model, with the experts that its requests need."""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ray.serve import metrics
from transformers.utils import logging as transformers_logging

from ..data.audio import read_audio
from ..inference.experts import load_base
from ..inference.subtitles import Transcript
from ..inference.transcribe import audio_context, transcribe_waveforms, with_detected_languages
from .catalog import Catalog
from .errors import ApiError, too_long, unreadable
from .expert_pool import ExpertPool
from .lane import Job, Lane
from .settings import Settings
from .turns import Turns

logger = logging.getLogger("ray.serve")  # whose messages Ray shows and keeps
# After these, a process can use its accelerator no more.
_FATAL: tuple[type[Exception], ...] = tuple(
    error for error in [getattr(torch, "AcceleratorError", None)] if error is not None
)


# Recordings of up to so many contexts have batches of their own, so that a short one waits for no long one.
_LANES = (1, 10)


class Abandoned(Exception):
    """Nobody waits for any recording of a batch."""


class Transcriber:
    """
    Transcribes recordings of all languages in batches.

    Recordings of similar lengths are one lane of batches. The lanes share the model: after each window of recordings
    that are longer than the model's context, others have their turn. `generate` runs in the threads of the lanes, so
    the event loop stays free for health checks and cancelled requests.
    """

    def __init__(self, settings: Settings, catalog: Catalog) -> None:
        transformers_logging.set_verbosity_error()  # as in `peft-clsr transcribe`
        torch.set_num_threads(settings.threads)
        model, self.processor = load_base(settings.model, getattr(torch, settings.dtype))
        self.settings, self.catalog = settings, catalog
        model = model.eval()
        model.to(torch.device(settings.device))  # type: ignore[arg-type]
        self.experts = ExpertPool(model, catalog, settings.max_experts)
        self.context, self.rate = audio_context(self.experts.model), self.processor.feature_extractor.sampling_rate
        self.turns = Turns()
        self.lanes = [Lane(self._run, settings.batch_size) for _ in range(len(_LANES) + 1)]
        self.fatal: Exception | None = None
        tags: Any = ("language", "adapter")
        self.heard_seconds = metrics.Counter("peft_clsr_audio_seconds", "Seconds of transcribed audio.", tags)
        self.loaded_experts = metrics.Gauge("peft_clsr_loaded_experts", "Experts in the memory of a replica.")

    def check_health(self) -> None:
        """Ray calls this, and replaces a replica for which it raises."""
        if self.fatal is not None:
            raise self.fatal

    async def transcribe(
        self, audio: bytes, file_name: str, language: str | None, task: str, prompt: str, temperature: float
    ) -> Transcript | ApiError:
        """
        Transcribe a recording, together with others.

        Args:
            audio (`bytes`): The file.
            file_name (`str`): Its name, for messages.
            language (`str`, *optional*): The tag of its language; `None` detects it.
            task (`str`): "transcribe" or "translate".
            prompt (`str`): As in [`transcribe_waveforms`].
            temperature (`float`): As in [`transcribe_waveforms`].

        Returns:
            `Transcript` or `ApiError`: the transcript, or why the file, the prompt or the expert cannot be used. Ray
            would log a raised error with its traceback, and a client's mistake needs none.
        """
        try:
            waveform = await asyncio.to_thread(self._read, audio, file_name)
            self._check_prompt(prompt)
            lane = self.lanes[self._lane_of(waveform)]
            transcript = await lane.submit(Job(waveform, language, task, prompt, temperature))
        except ApiError as error:
            return error
        served = self.catalog.served_language(transcript.language)
        self.heard_seconds.inc(transcript.seconds, {"language": served, "adapter": transcript.adapter or ""})
        return transcript if language is None else replace(transcript, language=language)

    def _read(self, audio: bytes, name: str) -> np.ndarray:
        """The waveform of a file. Its header may be wrong about its length, so no more than the limit is decoded."""
        limit = self.settings.max_seconds
        try:
            waveform = read_audio({"bytes": audio, "path": name}, self.rate, end=limit + 1)
        except ValueError as error:
            raise unreadable(error) from error
        if len(waveform) > limit * self.rate:
            raise too_long(name, limit)
        return waveform

    def _lane_of(self, waveform: np.ndarray) -> int:
        return bisect_left(_LANES, len(waveform) / (self.context * self.rate))

    def _check_prompt(self, prompt: str) -> None:
        try:
            self.processor.tokenizer.get_prompt_ids(prompt)
        except ValueError as error:  # it has special tokens
            raise ApiError(400, f"prompt {prompt!r} cannot be used: {error}", "prompt", "invalid_prompt") from error

    def _run(self, batch: list[Job]) -> list[Transcript | Exception]:
        """Transcribe a batch. If that fails, each job runs alone, so that it disturbs no other."""
        with self.turns:
            try:
                return self._transcribe(batch)
            except Exception as error:
                if len(batch) == 1 or isinstance(error, Abandoned):
                    return [self._noted(error)] * len(batch)
                logger.warning("a batch of %d failed, each recording runs alone: %r", len(batch), error)
            results: list[Transcript | Exception] = []
            for job in batch:
                try:
                    results += self._transcribe([job])
                except Exception as error:
                    results.append(self._noted(error))
            return results

    def _noted(self, error: Exception) -> Exception:
        """The error of a single job, noted if the process can work no more after it."""
        if isinstance(error, _FATAL):
            self.fatal = error
        if not isinstance(error, Abandoned):
            logger.error("a recording cannot be transcribed", exc_info=error)
        return error

    def _transcribe(self, jobs: list[Job]) -> list[Transcript | Exception]:
        """The transcripts of jobs of the same settings. Those whose expert cannot be loaded get an `ApiError`."""
        languages = self._languages(jobs)
        results: dict[Job, Transcript | Exception] = {}
        names = set()
        for job in jobs:
            try:
                names.add(self.experts.load(languages[job]))
            except (ValueError, OSError) as error:
                logger.error("an expert cannot be loaded", exc_info=error)
                message = f"the expert of {languages[job]!r} cannot be loaded: {error}"
                results[job] = ApiError(500, message, "language", "expert_unavailable")
        self.loaded_experts.set(len(self.experts.loaded))
        heard = [job for job in jobs if job not in results]

        def after_window(index: int, transcript: Transcript) -> None:
            if all(job.is_abandoned for job in jobs):
                raise Abandoned
            if self._lane_of(jobs[0].waveform) > 0:
                self.turns.pass_on()

        if heard:
            with self.experts.use(name for name in names if name is not None):
                transcripts = transcribe_waveforms(
                    self.experts.model,
                    self.processor,
                    [job.waveform for job in heard],
                    [languages[job] for job in heard],
                    task=heard[0].task,
                    prompt=heard[0].prompt,
                    temperature=heard[0].temperature,
                    on_window=after_window,
                )
            results |= zip(heard, transcripts, strict=True)
        return [results[job] for job in jobs]

    def _languages(self, jobs: list[Job]) -> dict[Job, str]:
        """The language of each job, given or detected."""
        languages = {}
        for job in jobs:
            if job.language is not None:
                # The expert's tag, as the model remembers each tag that takes the expert of a broader one.
                entry = self.catalog.expert(job.language)
                languages[job] = job.language if entry is None else entry[1].code
        unknown = [job for job in jobs if job.language is None]
        if unknown:
            waveforms = [job.waveform for job in unknown]
            given = [None] * len(unknown)
            candidates = self.catalog.languages
            detected = with_detected_languages(self.experts.model, self.processor, waveforms, given, candidates)
            languages |= zip(unknown, detected, strict=True)
        return languages
