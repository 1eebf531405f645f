"""Two machines: a packed stream on one disk; two launchers that meet on the loopback, with a disk each."""

import json
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest
import soundfile
import torch
from conftest import build_tokenizer, build_whisper
from helpers import noise
from safetensors.torch import load_file
from scripts import train_distributed
from transformers import WhisperFeatureExtractor, WhisperProcessor
from two_processes import run_in_two_processes

from peft_clsr.cli import main


def start(folders, *command):
    """The launchers of two machines, each of which works in its folder and runs one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launchers = []
    for rank, folder in enumerate(folders):
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no"]
        launch += ["--dynamo_backend", "no", "--num_machines", 2, "--num_processes", 2, "--machine_rank", rank]
        launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", port, "--rdzv_backend", "c10d"]
        # Both have the host's address, so that either might open the port.
        launch += ["--rdzv_conf", f"is_host={1 - rank},join_timeout=120"]
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")}
        launchers.append(
            subprocess.Popen(
                [str(part) for part in (*launch, *command)],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return launchers


def finish(launchers):
    """The outputs of both, which ended without an error."""
    outputs = [launcher.communicate(timeout=240)[0] for launcher in launchers]
    for launcher, output in zip(launchers, outputs, strict=True):
        assert launcher.returncode == 0, output[-3000:]
    return outputs


def adapters(folder):
    return {file.parent.name: load_file(file) for file in folder.glob("*/adapter_model.safetensors")}


def assert_same(one, other):
    assert one and one.keys() == other.keys()
    for language, weights in one.items():
        for name, weight in weights.items():
            torch.testing.assert_close(other[language][name], weight, atol=1e-6, rtol=1e-5)


@pytest.fixture
def processor():
    processor = WhisperProcessor(WhisperFeatureExtractor(chunk_length=1), build_tokenizer())
    processor.tokenizer.add_tokens([f"<|{step / 50:.2f}|>" for step in range(51)])
    return processor


def test_a_packed_stream_on_two_machines_gives_the_weights_of_one_process(processor, tmp_path):
    processor.save_pretrained(tmp_path / "processor")
    options = ["--windows", str(tmp_path / "processor"), "--stream", "--max_steps", "3"]  # two passes of 8 utterances
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    train_distributed.main([str(tmp_path / "one"), "--batch_size", "4", *options])
    two = [str(tmp_path / "two"), "--batch_size", "2", *options]
    run_in_two_processes(train_distributed.main, two, machines=2)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    assert_same(adapters(tmp_path / "one"), adapters(tmp_path / "two"))


@pytest.fixture
def command(processor, tmp_path):
    """`peft-clsr train` without random draws, on packed windows, with a teacher whose states are cached."""
    for name, seed in (("student", 0), ("teacher", 1)):
        whisper = build_whisper(processor.tokenizer, seed=seed, init_std=0.1)
        whisper.generation_config.max_length = 16  # noise makes a random model talk without end
        whisper.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    for split, size in (("train", 8), ("test", 1)):
        (tmp_path / "recordings" / split).mkdir(parents=True)
        rows = ["file_name,transcription", *(f"{index}.wav,text {index}" for index in range(size))]
        (tmp_path / "recordings" / split / "metadata.csv").write_text("\n".join(rows))
        for index in range(size):
            soundfile.write(tmp_path / "recordings" / split / f"{index}.wav", noise(0.3, seed=index), 16000)
    options = {"student": tmp_path / "student", "teacher": tmp_path / "teacher", "dataset": tmp_path / "recordings"}
    options |= {"languages": "ro", "output_dir": "out", "teacher_cache": "states", "use_cpu": True}
    options |= {"gate_noise": 0, "gate_dropout": 0, "expert_dropout": 0, "single": 1, "gate_dim": 8, "expert_rank": 4}
    options |= {"optim": "sgd", "learning_rate": 0.1, "max_steps": 60, "save_steps": 5, "save_total_limit": 3}
    return ["train", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


def test_after_a_machine_was_killed_the_command_resumes_and_gives_the_weights_of_one_process(
    command, tmp_path, monkeypatch
):
    """Each machine has its own disk: for checkpoints, prepared recordings and the teacher's states."""
    machines = [tmp_path / "first", tmp_path / "second"]
    two = ["-m", "peft_clsr", *command, "--save_on_each_node", "true", "--resume_from_checkpoint", "true"]
    launchers = start(machines, *two)
    checkpoint = machines[1] / "out" / "checkpoints" / "ro" / "checkpoint-5" / "trainer_state.json"
    deadline = time.monotonic() + 240
    while not checkpoint.exists() and time.monotonic() < deadline and launchers[1].poll() is None:
        time.sleep(0.01)
    machine = psutil.Process(launchers[1].pid)
    for process in (machine, *machine.children(recursive=True)):  # the launcher and its worker
        process.kill()
    output = launchers[0].communicate(timeout=240)[0]
    assert launchers[0].returncode != 0 and "ro: the training stopped after" in output, output[-3000:]
    assert not (machines[0] / "out" / "README.md").exists()

    outputs = finish(start(machines, *two))
    assert "| ro" in outputs[0] and "| ro" not in outputs[1]  # the main process alone prints and writes
    assert not (machines[1] / "out" / "results.json").exists()
    assert not [*tmp_path.glob("*/out/checkpoints/*")]
    row = json.loads((machines[0] / "out" / "results.json").read_text())["languages"]["ro"]
    assert row["train_steps"] == 60

    monkeypatch.chdir(tmp_path)
    assert main([*command, "--per_device_train_batch_size", "2"]) == 0
    assert_same(adapters(tmp_path / "out"), adapters(machines[0] / "out"))
