"""`peft-clsr serve`: one service for many languages, with OpenAI's interface."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import threading
import time
from pathlib import Path

DESCRIPTION = "serve a Whisper and its language experts, with OpenAI's interface"

_EPILOG = """\
Each request takes the expert of its language, or the base model if there is none. Requests of all languages share
batches. Experts are loaded at first use. With several languages in --language, or none, the language of a request
without one is detected by the base model.

If PEFT_CLSR_API_KEY is set, clients must send this key. Metrics of Ray and of the service are at --metrics_port.

examples:
  peft-clsr serve --model openai/whisper-small --adapters me/experts
  curl http://127.0.0.1:8000/v1/audio/transcriptions -F model=openai/whisper-small -F language=ca -F file=@talk.mp3
"""

KEY = "PEFT_CLSR_API_KEY"


def make_parser(prog: str, everything: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION, epilog=_EPILOG)
    add = parser.add_argument_group("model and languages").add_argument
    add("--model", required=True, help="base Whisper: Hub id or folder")
    add(
        "--adapters",
        nargs="+",
        default=[],
        help="experts: an adapter folder, a folder with one folder a language, or a Hub repository",
    )
    add("--language", nargs="+", default=[], help="serve only these, tags or English names; all by default")
    add("--served_model_name", help="the model's name for clients; by default the Hub id, or the folder's name")
    add = parser.add_argument_group("address").add_argument
    add("--host", default="127.0.0.1", help="where to listen; 0.0.0.0 for all networks")
    add("--port", type=int, default=8000, help="the port")
    add("--metrics_port", type=int, default=8001, help="port of the metrics, in the format of Prometheus")
    add = parser.add_argument_group("speed").add_argument
    add("--replicas", type=int, default=1, help="copies of the model")
    add("--threads", type=int, help="CPU threads of a replica; by default the cores of this machine, shared")
    add("--batch_size", type=int, default=8, help="recordings at a time, in a replica")
    add("--max_experts", type=int, default=16, help="experts in the memory of a replica; others are loaded again")
    add("--device", choices=["cpu", "cuda"], help="cuda: a GPU for each copy; the default if there is one")
    add("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="precision of base and experts")
    add("--ray_address", help="a running Ray cluster, such as auto; by default a Ray on this machine alone")
    add = parser.add_argument_group("limits").add_argument
    add("--max_megabytes", type=float, default=25, help="size of a file")
    add("--max_seconds", type=float, default=7200, help="length of a recording")
    add("--max_queue", type=int, default=64, help="requests that wait for a replica; more are refused")
    return parser


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    arguments = parser.parse_args(argv)
    from ..extras import require

    # Ray reads these when it is imported. A service tells nobody that it runs, and a Ray for one machine is reached
    # from this machine alone; the name is from systems where that is Ray's default.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if arguments.ray_address is None:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        for name in ("av", "soundfile", "soxr", "ray.serve", "fastapi", "python_multipart"):
            require(name)
        import torch

        from ..serving.catalog import make_catalog
        from ..serving.gate import hash_key
        from ..serving.service import make_service, start_service, stop_service
        from ..serving.settings import Settings

        _check(arguments)
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and arguments.ray_address is None and arguments.replicas > torch.cuda.device_count():
            gpus = torch.cuda.device_count()
            raise ValueError(f"--replicas is {arguments.replicas}, and each takes one of the {gpus} GPUs: give fewer")
        cores = os.cpu_count() or 1
        key = os.environ.get(KEY, "").strip()  # the server strips the key of a client, too
        if os.environ.get(KEY) and not key:
            raise ValueError(f"{KEY} has spaces alone, expected a key: give one, or leave the variable unset")
        settings = Settings(
            model=arguments.model,
            name=arguments.served_model_name or _name(arguments.model),
            created=int(time.time()),
            device=device,
            dtype=arguments.dtype,
            threads=arguments.threads or max(1, cores // arguments.replicas),
            replicas=arguments.replicas,
            batch_size=arguments.batch_size,
            max_experts=arguments.max_experts,
            max_bytes=round(arguments.max_megabytes * 2**20),
            max_seconds=arguments.max_seconds,
            max_queue=arguments.max_queue,
            key_hash=hash_key(key) if key else None,
        )
        catalog = make_catalog(arguments.model, arguments.adapters, arguments.language)
        start_service(
            make_service(settings, catalog),
            arguments.ray_address,
            arguments.host,
            arguments.port,
            settings.threads * settings.replicas,
            arguments.metrics_port,
        )
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        parser.exit(2, f"error: {error}\n")
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell has it ignored, and instead of Ray's handlers
        signal.signal(number, lambda *_: stopped.set())
    experts = ", ".join(sorted(expert.code for _, expert in catalog.experts)) or "none"
    print(f"{settings.name} at http://{arguments.host}:{arguments.port}/v1, experts: {experts}", flush=True)
    if not key and arguments.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"everybody who reaches {arguments.host} is served: set {KEY} to ask for a key", flush=True)
    stopped.wait()
    stop_service()
    return 0


def _name(model: str) -> str:
    """The name of a model for clients, who need not know folders of this machine."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _check(arguments: argparse.Namespace) -> None:
    """Raise a `ValueError` for a number that cannot be used."""
    for name in ("replicas", "batch_size", "max_experts", "max_queue"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}, expected at least 1")
    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError(f"--threads is {arguments.threads}, expected at least 1")
    for name in ("max_megabytes", "max_seconds"):
        if not getattr(arguments, name) > 0:
            raise ValueError(f"--{name} is {getattr(arguments, name):g}, expected more than 0")
    for name in ("port", "metrics_port"):
        if not 0 < getattr(arguments, name) < 2**16:
            raise ValueError(f"--{name} is {getattr(arguments, name)}, expected a port, from 1 to {2**16 - 1}")
    if arguments.ray_address is None:  # Ray says so only in its logs
        for name, host in (("port", arguments.host), ("metrics_port", "127.0.0.1")):
            _check_port(f"--{name}", host, getattr(arguments, name))


def _check_port(option: str, host: str, port: int) -> None:
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    try:
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        raise ValueError(f"{option} {port} of {host} cannot be used: {error.strerror}; give another one") from error
