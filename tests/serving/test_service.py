"""`peft-clsr serve`: a real Ray on the loopback, with openai's client."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import SPECIAL_TOKENS, build_tokenizer, build_whisper
from helpers import noise, random_clsr
from transformers import WhisperFeatureExtractor, WhisperProcessor

from peft_clsr import CLSRConfig, save_language

pytest.importorskip("ray.serve")
openai = pytest.importorskip("openai")

TIMESTAMPS = [f"<|{position / 50:.2f}|>" for position in range(51)]
LANGUAGES = ("ca", "ro", "be", "bg", "el")
KEY = "a secret"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a Whisper of 1 s of context, and one with an expert for each of five languages."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = build_tokenizer([*SPECIAL_TOKENS, *TIMESTAMPS])
    whisper = build_whisper(tokenizer, init_std=0.2, vocab_size=len(tokenizer))
    whisper.generation_config.max_length = 12  # noise makes a random model talk without end
    whisper.save_pretrained(folder / "tiny")
    WhisperProcessor(WhisperFeatureExtractor(chunk_length=1), tokenizer).save_pretrained(folder / "tiny")
    random_clsr(whisper, *LANGUAGES).save_pretrained(folder / "experts")
    return folder


@pytest.fixture(scope="module")
def service(base):
    """The command with two replicas."""
    port, metrics_port = free_port(), free_port()
    command = [sys.executable, "-m", "peft_clsr", "serve", "--model", "tiny", "--adapters", "experts"]
    command += ["--port", port, "--metrics_port", metrics_port, "--device", "cpu", "--replicas", 2, "--threads", 1]
    command += ["--batch_size", 4, "--max_experts", 3, "--max_megabytes", 1, "--max_seconds", 20, "--max_queue", 24]
    environment = os.environ | {"PEFT_CLSR_API_KEY": KEY, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    log = base / "log"
    with log.open("w") as output:
        process = subprocess.Popen(list(map(str, command)), cwd=base, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while " at http://" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield SimpleNamespace(port=port, metrics_port=metrics_port, process=process, log=log)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


@pytest.fixture
def client(service):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{service.port}/v1", api_key=KEY, max_retries=0)


def test_models(client):
    t = time.time()
    print(client.models.list())
