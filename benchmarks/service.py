"""
Compare one service with eight experts to eight processes with one fine-tuned model each.

    python -m benchmarks.service --model .cache/whisper-base --adapter runs/demo-s1/ro --dataset .cache/tuxpaint-ro \
        --output service.jsonl

Time and memory depend on the size of an expert, not on its language. So the eight are copies of one, under the names
ro-x-a to ro-x-h, and all recordings are in its language. A fine-tuned model is the expert, frozen to a plain Whisper.
Both sides have the same batch size and clients. The service has --threads, and so has each process, as the others may
be idle. There are two loads:
- even: the requests of all languages come in turn;
- one: all requests are of one language, as when one part of the world is awake.

The service is `peft-clsr serve`, with openai's client. A process of the other side has neither HTTP nor Ray: it takes
up to a batch of what waits for its language, and calls `transcribe_waveforms`. Memory is the proportional set size
(PSS) of all processes of a side, in which shared pages count once.

Finished rows are in --output and are not measured again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil
import torch
from transformers.utils import logging

from peft_clsr import freeze_routing, load_recordings, prepare_dataset, read_audio
from peft_clsr.files import to_json
from peft_clsr.inference.experts import load_base, load_with_experts
from peft_clsr.inference.transcribe import transcribe_waveforms

NAMES = "abcdefgh"
BATCH_SIZE = 8
CLIENTS = 16
Ask = Callable[[str, Path], None]  # transcribes a recording in a language, and waits for it


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def memory_of(processes: list[psutil.Process]) -> float:
    """PSS of processes, in GB."""
    return sum(process.memory_full_info().pss for process in processes) / 1e9


@contextmanager
def service(model: str, experts: Path, languages: list[str], threads: int) -> Iterator[tuple[Ask, Callable]]:
    """The service: how to ask it, and its processes."""
    port = free_port()
    command = [sys.executable, "-m", "peft_clsr", "serve", "--model", model, "--adapters", str(experts)]
    command += ["--served_model_name", "whisper", "--port", str(port), "--metrics_port", str(free_port())]
    command += ["--threads", str(threads), "--batch_size", str(BATCH_SIZE), "--device", "cpu"]
    log = experts.parent / "log"
    with log.open("w") as output:
        process = psutil.Popen(command, stdout=output, stderr=output)
    try:
        while " at http://" not in log.read_text():
            if process.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.5)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")

        def ask(language: str, path: Path) -> None:
            with path.open("rb") as file:
                client.audio.transcriptions.create(model="whisper", file=file, language=language)

        yield ask, lambda: [process, *process.children(recursive=True)]
    finally:
        process.terminate()
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()


def serve_language(model: str, language: str, threads: int, jobs: Any, finished: Any) -> None:
    """One process of the other side."""
    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    whisper, processor = load_base(model)
    whisper.eval()
    while True:
        batch = [jobs.get()]
        while len(batch) < BATCH_SIZE:
            try:
                batch.append(jobs.get_nowait())
            except queue.Empty:
                break
        waveforms = [read_audio(path) for path, _ in batch]
        transcribe_waveforms(whisper, processor, waveforms, [language] * len(batch))
        for _, number in batch:
            finished[number].set()


@contextmanager
def processes(folder: Path, language: str, names: list[str], threads: int) -> Iterator[tuple[Ask, Callable]]:
    """A process for each language: how to ask them, and the processes."""
    context = multiprocessing.get_context("spawn")
    finished = [context.Event() for _ in range(CLIENTS)]
    free: queue.Queue[int] = queue.Queue()
    for number in range(CLIENTS):
        free.put(number)
    jobs = {name: context.Queue() for name in names}
    running = []
    for name in names:
        arguments = (str(folder / name), language, threads, jobs[name], finished)
        running.append(context.Process(target=serve_language, args=arguments, daemon=True))
        running[-1].start()

    def ask(name: str, path: Path) -> None:
        number = free.get()
        finished[number].clear()
        jobs[name].put((path, number))
        while not finished[number].wait(5):
            if not all(process.is_alive() for process in running):
                raise RuntimeError("a process died")
        free.put(number)

    try:
        yield ask, lambda: [psutil.Process(process.pid) for process in running]
    finally:
        for process in running:
            process.kill()
            process.join()


def make_models(model: str, adapter: Path, dataset: str, folder: Path) -> tuple[str, list[str]]:
    """Write the experts and the fine-tuned models. Returns the language, and the names of its copies."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    language = config["language"]
    names = [f"{language}-x-{name}" for name in NAMES]
    routed, processor = load_with_experts(model, [str(adapter)], {language})
    recordings = load_recordings(dataset, language, "train", limit=8)
    prepared, _ = prepare_dataset(recordings, processor, language)
    frozen = freeze_routing(routed, language, dataset=prepared, processor=processor, undecided="majority").model
    for name in names:
        expert = folder / "experts" / name
        expert.mkdir(parents=True)
        copied = config | {"language": name, "prompt_language": language}
        (expert / "adapter_config.json").write_text(to_json(copied), encoding="utf-8")
        (expert / "adapter_model.safetensors").symlink_to((adapter / "adapter_model.safetensors").resolve())
        frozen.save_pretrained(folder / "models" / name)  # not links: eight models on disk share no page
        processor.save_pretrained(folder / "models" / name)
    return language, names


def measure(side: Any, names: list[str], paths: list[Path], load: str, requests: int) -> dict[str, float]:
    """Requests a minute, and memory in GB after them."""
    with side as (ask, running), ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(ask, names, paths))  # loads all experts
        asked = [names[number % len(names)] if load == "even" else names[0] for number in range(requests)]
        heard = [paths[number % len(paths)] for number in range(requests)]
        start = time.perf_counter()
        list(clients.map(ask, asked, heard))
        seconds = time.perf_counter() - start
        return {"requests_per_minute": 60 * requests / seconds, "gigabytes": memory_of(running())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/whisper-base", help="base Whisper")
    parser.add_argument("--adapter", type=Path, default=Path("runs/demo-ro/ro"), help="folder of an expert")
    parser.add_argument("--dataset", default=".cache/tuxpaint-ro", help="recordings in its language")
    parser.add_argument("--requests", type=int, default=96, help="of each row")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the service, and of each process")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    rows = []
    if arguments.output.exists():
        rows = [json.loads(line) for line in arguments.output.read_text(encoding="utf-8").splitlines()]
    done = {(row["side"], row["load"]) for row in rows}
    wanted = [(side, load) for load in ("even", "one") for side in ("service", "processes")]
    pending = [row for row in wanted if row not in done]
    if pending:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            language, names = make_models(arguments.model, arguments.adapter, arguments.dataset, folder)
            recordings = load_recordings(arguments.dataset, language, "test", limit=max(len(names), 64))
            paths = [Path(path) for path in recordings["audio"][:]]
            sides = {
                "service": partial(service, arguments.model, folder / "experts", names, arguments.threads),
                "processes": partial(processes, folder / "models", language, names, arguments.threads),
            }
            for side, load in pending:
                row = {"side": side, "load": load, "requests": arguments.requests}
                row |= measure(sides[side](), names, paths, load, arguments.requests)
                rows.append(row)
                with arguments.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    print("| | load | requests a minute | memory |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['side']} | {row['load']} | {row['requests_per_minute']:.1f} | {row['gigabytes']:.2f} GB |")


if __name__ == "__main__":
    main()
