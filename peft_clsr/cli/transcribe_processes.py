"""`peft-clsr transcribe --num_processes`: deals recordings out to several processes on one machine."""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .transcribe import Share

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from ..inference.recordings import Recording
    from ..inference.subtitles import Transcript
    from .transcribe import TranscribeRecordings


def load_in_processes(
    count: int, arguments: argparse.Namespace, languages: set[str | None], candidates: list[str]
) -> TranscribeRecordings:
    """
    Start processes that load the model, each with its share of the CPU cores.

    Processes only transcribe: what they hear comes back here. If one dies, the recordings that it has are skipped, and
    the others go on.

    Args:
        count (`int`): Processes, at least 2.

    The rest is as in `load` of a runtime.

    Raises:
        ValueError: a process died.
        Exception: what `load` of the runtime raises.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // count)
    workers: list[_Worker] = []
    try:
        for number in range(count):
            workers.append(_start(arguments, languages, candidates, Share(number, threads)))
        for worker in workers:
            try:
                worker.receive()
            except EOFError as error:
                raise ValueError(
                    f"a process {worker.how_it_died()} while it loaded the model: give fewer --num_processes"
                ) from error
    except BaseException:
        _end(workers)
        raise
    return partial(_transcribe, workers, arguments.batch_size)


@dataclass
class _Worker:
    """A process, the connection to it, whether it has recordings, and those of them that it has not finished."""

    process: SpawnProcess
    connection: Connection
    is_busy: bool = False
    batch: set[Path] = field(default_factory=set)

    def give(self, batch: Sequence[Recording]) -> None:
        self.is_busy, self.batch = bool(batch), {recording.path for recording in batch}
        if batch:
            with suppress(OSError):  # it is dead, as the next `receive` says
                self.connection.send(batch)

    def receive(self) -> tuple[str, list[Any]]:
        """
        Return the kind of its next message, and the rest.

        Raises:
            EOFError: it died.
            Exception: what it raised itself.
        """
        try:
            kind, *content = self.connection.recv()
        except OSError as error:  # it died within a message
            raise EOFError from error
        if kind == "error":
            raise content[0]
        return kind, content

    def how_it_died(self) -> str:
        self.process.join()
        code = self.process.exitcode or 0
        return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"


def _start(arguments: argparse.Namespace, languages: set[str | None], candidates: list[str], share: Share) -> _Worker:
    context = multiprocessing.get_context("spawn")  # a fork would copy locks of torch's threads
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, arguments, languages, candidates, share), daemon=True)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for this process, which ends them
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    there.close()  # so that only the process holds it, and its death ends the connection
    return _Worker(process, here)


def _end(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        worker.process.join()
        worker.connection.close()


def _work(
    connection: Connection,
    arguments: argparse.Namespace,
    languages: set[str | None],
    candidates: list[str],
    share: Share,
) -> None:
    """In a process: load the model, then transcribe the batches that come until the connection ends."""

    def send(kind: str, *content: Any) -> None:
        connection.send((kind, *content))

    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore, which a killed process would leave behind
    try:
        runtime = importlib.import_module(f".transcribe_{arguments.runtime}", __package__)
        transcribe = runtime.load(arguments, languages, candidates, share)
        send("ready")
        while True:
            batch = connection.recv()
            for path, transcript in transcribe(batch, partial(send, "heard"), partial(send, "warning")):
                send("finished", path, transcript)
            send("ready")
    except (EOFError, BrokenPipeError):  # the command is gone
        return
    except Exception as error:
        send("error", ExceptionWithTraceback(error, error.__traceback__))


def _transcribe(
    workers: Sequence[_Worker],
    batch_size: int,
    recordings: list[Recording],
    keep: Callable[[Path, Transcript], None],
    warn: Callable[[str], None],
) -> Generator[tuple[Path, Transcript], None, None]:
    """Give each process recordings whenever it has none, until all are transcribed or no process is left."""
    waiting, living = deque(recordings), list(workers)
    finished, heard = 0.0, dict[Path, float]()  # seconds of finished recordings, and of each other one
    try:
        with tqdm(total=round(sum(recording.seconds for recording in recordings)), desc="audio", unit="s") as progress:
            for worker in living:
                worker.give(_next_batch(waiting, len(living), batch_size))
            while busy := [worker for worker in living if worker.is_busy]:
                ready = wait([worker.connection for worker in busy])
                for worker in (worker for worker in busy if worker.connection in ready):
                    try:
                        kind, content = worker.receive()
                    except EOFError:
                        living.remove(worker)
                        _tell_death(worker, warn)
                        continue
                    if kind == "warning":
                        warn(*content)
                    elif kind == "heard":
                        path, transcript = content
                        heard[path] = transcript.segments[-1]["end"] if transcript.segments else 0.0
                        keep(path, transcript)
                    elif kind == "finished":
                        path, transcript = content
                        heard.pop(path, None)
                        finished += transcript.seconds
                        worker.batch.remove(path)
                        yield path, transcript
                    else:
                        worker.give(_next_batch(waiting, len(living), batch_size))
                    progress.update(round(finished + sum(heard.values())) - progress.n)
        if waiting:
            warn(f"skipped: {len(waiting)} more recordings, as no process is left")
    finally:
        _end(workers)


def _next_batch(waiting: deque[Recording], processes: int, size: int) -> list[Recording]:
    """
    Take the longest recordings that wait: at most `size`, and at most one process's share of the seconds that wait.

    So no process gets all long recordings, and the last batches are small: all processes end at about the same time.
    """
    share = sum(recording.seconds for recording in waiting) / processes
    batch: list[Recording] = []
    while waiting and len(batch) < size and (not batch or waiting[0].seconds <= share):
        batch.append(waiting.popleft())
        share -= batch[-1].seconds
    return batch


def _tell_death(worker: _Worker, warn: Callable[[str], None]) -> None:
    how = worker.how_it_died()
    for path in sorted(worker.batch):
        warn(f"skipped: {path}: its process {how}")
    warn(
        f"a process {how}: start the command again for the recordings that it had, with fewer --num_processes or a "
        "smaller --batch_size if memory ran out"
    )
