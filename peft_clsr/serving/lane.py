"""
Requests that wait for a model, and leave in batches.

`serve.batch` closes a batch a fixed time after its first request, also while the model is busy. Under load, requests
that come one after another would then run one by one. Here a batch is taken when the model is free.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ..inference.subtitles import Transcript

# Requests that come together share a batch, also if the model is free: the first one waits so many seconds for others.
_ARRIVAL = 0.02


@dataclass(eq=False)
class Job:
    """
    A recording to transcribe.

    Args:
        waveform (`np.ndarray`): float32 [samples] at the processor's rate.
        language (`str`, *optional*): Its tag; `None` detects it.
        task (`str`): "transcribe" or "translate".
        prompt (`str`): As in [`transcribe_waveforms`].
        temperature (`float`): As in [`transcribe_waveforms`].
    """

    waveform: np.ndarray
    language: str | None
    task: str
    prompt: str
    temperature: float
    result: asyncio.Future[Transcript] = field(init=False)

    @property
    def settings(self) -> tuple[str, str, float]:
        """What all recordings of a call of `generate` have in common."""
        return self.task, self.prompt, self.temperature

    @property
    def is_abandoned(self) -> bool:
        """True if nobody waits for the result."""
        return self.result.cancelled()


class Lane:
    """
    Runs jobs in batches, in one thread.

    Args:
        run (`Callable`): Gets jobs of the same settings. Returns a transcript or an exception for each.
        batch_size (`int`): Jobs at a time.
    """

    def __init__(self, run: Callable[[list[Job]], Sequence[Transcript | Exception]], batch_size: int) -> None:
        self._run, self._batch_size = run, batch_size
        self._waiting: list[Job] = []
        self._thread = ThreadPoolExecutor(1)
        self._worker: asyncio.Task[None] | None = None

    async def submit(self, job: Job) -> Transcript:
        """Wait for the transcript. A job whose caller is cancelled before its batch starts does not run."""
        job.result = asyncio.get_running_loop().create_future()
        self._waiting.append(job)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await job.result

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(_ARRIVAL)
        while batch := self._next_batch():
            try:
                results = await loop.run_in_executor(self._thread, self._run, batch)
            except Exception as error:
                results = [error] * len(batch)
            for job, result in zip(batch, results, strict=True):
                if job.result.done():  # cancelled
                    continue
                if isinstance(result, Exception):
                    job.result.set_exception(result)
                else:
                    job.result.set_result(result)

    def _next_batch(self) -> list[Job]:
        """The job that waits for longest, with others of its settings."""
        waiting = [job for job in self._waiting if not job.is_abandoned]
        batch = [job for job in waiting if job.settings == waiting[0].settings][: self._batch_size]
        self._waiting = [job for job in waiting if job not in batch]
        return batch
