"""`peft-clsr serve`: a real Ray on the loopback, and openai's client."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import soundfile
from helpers import free_port, noise

from peft_clsr.cli import main

pytest.importorskip("ray.serve")
openai = pytest.importorskip("openai")
psutil = pytest.importorskip("psutil")

KEY = "a secret"
REPLICAS, BATCH_SIZE, QUEUE = 2, 4, 16


@pytest.fixture(scope="module")
def service(models):
    """The command, with two replicas, each of which may keep three of the five experts."""
    port, metrics_port = free_port(), free_port()
    command = [sys.executable, "-m", "peft_clsr", "serve", "--model", "tiny", "--adapters", "experts"]
    command += ["--port", port, "--metrics_port", metrics_port, "--device", "cpu", "--threads", 1]
    command += ["--replicas", REPLICAS, "--batch_size", BATCH_SIZE, "--max_queue", QUEUE, "--max_experts", 3]
    command += ["--max_megabytes", 1, "--max_seconds", 20]
    path = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PEFT_CLSR_API_KEY": KEY, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    log = models / "log"
    with log.open("w") as output:
        process = subprocess.Popen(list(map(str, command)), cwd=models, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 300  # on a busy machine
        while " at http://" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield SimpleNamespace(address=f"http://127.0.0.1:{port}", metrics_port=metrics_port, process=process, log=log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        process.kill()


@pytest.fixture
def client(service):
    return openai.OpenAI(base_url=f"{service.address}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def transcripts(models, recordings, tmp_path_factory):
    """A factory of what `peft-clsr transcribe` makes of all recordings in a format: text by name."""

    @functools.cache
    def transcribe(output_format, *arguments):
        folder = tmp_path_factory.mktemp("out")
        table = recordings[0].path.parent / "metadata.csv"
        rows = [f"{recording.path.name},{recording.language}" for recording in recordings]
        table.write_text("\n".join(["file_name,language", *rows]) + "\n")
        command = ["transcribe", table, "--model", models / "tiny", "--adapters", models / "experts"]
        command += ["--device", "cpu", "--output_dir", folder, "--output_format", output_format, *arguments]
        assert main(list(map(str, command))) == 0
        return {path.stem: path.read_text(encoding="utf-8") for path in folder.iterdir()}

    return transcribe


def transcribers(service):
    """The processes of the replicas."""
    children = psutil.Process(service.process.pid).children(recursive=True)
    return [child for child in children if "Transcriber" in " ".join(child.cmdline())]


def ask(client, recording, **options):
    with recording.path.open("rb") as file:
        options = {"model": "tiny", "language": recording.language, **options}
        return client.audio.transcriptions.create(file=file, **options)


def test_the_model_and_its_languages_are_listed(client):
    (model,) = client.models.list()
    assert model.id == "tiny" and model == client.models.retrieve("tiny")
    assert model.experts == ["be", "bg", "ca", "el", "ro"] and model.languages == [
        *model.experts[:4],
        "en",
        "fr",
        "ro",
    ]


def test_formats_are_those_of_the_command(client, recordings, transcripts):
    expected = {name: json.loads(text) for name, text in transcripts("json").items()}
    for recording in recordings[2:4]:
        transcript = expected[recording.path.stem]
        answer = ask(client, recording, response_format="verbose_json", timestamp_granularities=["segment"])
        assert (answer.task, answer.language, answer.adapter) == ("transcribe", recording.language, recording.language)
        assert answer.text == transcript["text"]
        assert answer.duration == transcript["seconds"]
        segments = [{"start": one.start, "end": one.end, "text": one.text.strip()} for one in answer.segments]
        assert segments == transcript["segments"] and len(segments) > 1
        assert [segment.id for segment in answer.segments] == list(range(len(segments)))
        assert answer.segments[0].avg_logprob is None  # not known
        assert ask(client, recording, response_format="text") == transcript["text"] + "\n"
    for output_format in ("srt", "vtt"):
        content = transcripts(output_format)[recording.path.stem]
        assert ask(client, recording, response_format=output_format) == content


def test_a_translation_and_a_prompt_and_a_temperature_change_the_text(client, recordings, transcripts):
    recording = recordings[3]
    translated = json.loads(transcripts("json", "--task", "translate")[recording.path.stem])["text"]
    with recording.path.open("rb") as file:
        extra = {"language": recording.language}
        answer = client.audio.translations.create(model="tiny", file=file, extra_body=extra)
    assert answer.text == translated
    texts = [ask(client, recording, **options).text for options in ({}, {"prompt": "un dos"}, {"temperature": 1.0})]
    assert len({translated, *texts}) == 4


def test_a_language_that_is_not_given_is_detected(client, recordings):
    (answer,) = [
        client.audio.transcriptions.create(model="tiny", file=file, response_format="verbose_json")
        for file in [recordings[3].path.open("rb")]
    ]
    assert answer.text == ask(client, SimpleNamespace(path=recordings[3].path, language=answer.language)).text


BAD = {
    "language": ({"language": "catalann"}, 400, "invalid_language", "language 'catalann' is neither a language tag"),
    "unserved": ({"language": "de"}, 400, "invalid_language", "'de' has no expert here, and the model does not know"),
    "model": ({"model": "whisper-1"}, 404, "model_not_found", "this service has 'tiny'"),
    "words": ({"timestamp_granularities": ["word"]}, 400, "invalid_field", "'word': Input should be 'segment'"),
    "times": (
        {"timestamp_granularities": ["segment"]},
        400,
        "invalid_field",
        "need the response_format",
    ),
    "format": ({"response_format": "diarized_json"}, 400, "invalid_field", "'diarized_json': Input should be 'json'"),
    "temperature": ({"temperature": 1.5}, 400, "invalid_field", "temperature is '1.5': Input should be less than"),
    "stream": ({"stream": True}, 400, "invalid_field", "the field 'stream' is not supported here"),
    "prompt": ({"prompt": "<|ca|>"}, 400, "invalid_prompt", "disallowed special token: <|ca|>"),
    "no audio": ({"file": ("a.mp3", b"no audio" * 99)}, 400, "invalid_file", "audio a.mp3 cannot be read"),
    "empty": ({"file": ("a.mp3", b"")}, 400, "invalid_file", "audio a.mp3 is empty"),
    "size": (
        {"file": ("a.mp3", bytes(3 * 2**20))},
        413,
        "file_too_large",
        "larger than the limit of this service, 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_openais_error(client, recordings, name):
    options, status, code, message = BAD[name]
    with recordings[0].path.open("rb") as file, pytest.raises(openai.APIStatusError) as caught:
        client.audio.transcriptions.create(**{"model": "tiny", "file": file, "language": "ca", **options})
    assert caught.value.status_code == status
    assert caught.value.body["code"] == code and caught.value.type == "invalid_request_error"
    assert message in caught.value.body["message"]


def test_a_recording_is_too_long_or_cut_off(client, tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(21), 16000)
    with pytest.raises(openai.BadRequestError, match="a.wav is longer than the limit of this service, 20 s"):
        ask(client, SimpleNamespace(path=path, language="ca"))
    soundfile.write(path.with_suffix(".flac"), noise(2), 16000)
    content = path.with_suffix(".flac").read_bytes()
    with pytest.raises(openai.BadRequestError, match="a.flac"):
        client.audio.transcriptions.create(model="tiny", file=("a.flac", content[: len(content) // 2]))


def test_a_wrong_key_is_refused_and_health_needs_none(service, recordings):
    stranger = openai.OpenAI(base_url=f"{service.address}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
        ask(stranger, recordings[0])
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{service.address}/v1/models")
    with urllib.request.urlopen(f"{service.address}/health") as answer:
        assert json.load(answer) == {"status": "ok", "replicas": {"RUNNING": REPLICAS}}


@contextmanager
def stopped(processes):
    """Processes that do not run within this context."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def test_a_full_queue_refuses_and_clients_that_leave_disturb_nobody(service, client, recordings, transcripts):
    expected = {name: json.loads(text)["text"] for name, text in transcripts("json").items()}
    room = REPLICAS * 3 * BATCH_SIZE + QUEUE

    def attempt(index):
        recording = recordings[index % 16]
        leaves = index % 4 == 0
        try:
            text = ask(client, recording, timeout=2 if leaves else 60).text
        except openai.APITimeoutError:
            return "left"
        except openai.APIStatusError as error:
            assert error.body["code"] == "overloaded" and error.response.headers["retry-after"] == "1"
            return error.status_code
        assert text == expected[recording.path.stem]
        return "text"

    with ThreadPoolExecutor(2 * room) as pool:
        with stopped(transcribers(service)):
            answers = [pool.submit(attempt, index) for index in range(2 * room)]
            deadline = time.monotonic() + 20
            while sum(answer.done() for answer in answers) < room and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(1)
        results = [answer.result() for answer in answers]
    # Those that leave make room for others, and Ray's bound is not exact: a few more than `room` may get their text.
    assert results.count(503) >= room // 4 and results.count("text") >= QUEUE and results.count("left") > 0


def test_sixteen_clients_lose_no_request_when_a_replica_dies(service, client, recordings, transcripts):
    """Their client does not retry: the service sends the requests of the dead replica to the other one."""
    expected = {name: json.loads(text)["text"] for name, text in transcripts("json").items()}
    assert len(set(expected.values())) > 12
    victim = transcribers(service)[0]
    answered = threading.Semaphore(0)

    def work(start):
        heard = []
        for step in range(3):
            recording = recordings[(start + 5 * step) % 16]
            heard.append((recording.path.stem, ask(client, recording).text))
            answered.release()
        return heard

    with ThreadPoolExecutor(16) as pool:
        clients = [pool.submit(work, start) for start in range(16)]
        for _ in range(8):
            answered.acquire()
        victim.kill()
        heard = [pair for one in clients for pair in one.result()]
    assert len(heard) == 48 and all(text == expected[name] for name, text in heard)
    assert "a replica died, and its request goes to another one" in service.log.read_text()


def test_metrics_are_those_of_ray_and_the_service(service):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"http://127.0.0.1:{service.metrics_port}/metrics") as answer:
            text = answer.read().decode()
        if "peft_clsr_audio_seconds" in text and 'language="ro"' in text:
            break
        time.sleep(0.5)
    for name in ("peft_clsr_audio_seconds", "peft_clsr_loaded_experts", "serve_num_http_requests"):
        assert f"ray_{name}" in text


def test_ray_listens_on_the_loopback_alone(service):
    children = psutil.Process(service.process.pid).children(recursive=True)
    listening = {
        (connection.laddr.ip.removeprefix("::ffff:"), process.name())
        for process in children
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    listening = {(ip, name) for ip, name in listening if "ServeReplica" not in name}  # Ray Serve gives no choice there
    assert listening and {ip for ip, _ in listening} == {"127.0.0.1"}, listening
