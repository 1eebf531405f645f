"""`peft-clsr convert`: an expert of the reference implementation becomes an adapter."""

import subprocess
import sys

import pytest
import torch
from naver import checkpoint_of

from peft_clsr import CLSRConfig


@pytest.fixture
def convert(tiny_whisper, tmp_path):
    """Runs the command on a checkpoint of Catalan; `convert("ca", "--language", "ca")` writes to the folder "ca"."""

    def run(output_dir, *options):
        torch.save(checkpoint_of(tiny_whisper()), tmp_path / "expert.bin")
        command = [
            sys.executable,
            "-m",
            "peft_clsr",
            "convert",
            str(tmp_path / "expert.bin"),
            str(tmp_path / output_dir),
        ]
        return subprocess.run([*command, *options], capture_output=True, text=True)

    return run


def test_the_command(convert, tmp_path):
    done = convert("ca", "--language", "ca", "--base_model_name_or_path", "mine/base")
    assert done.returncode == 0 and done.stdout == f"wrote {tmp_path / 'ca'}\n", done.stderr
    config = CLSRConfig.from_pretrained(str(tmp_path / "ca"))
    assert (config.language, config.base_model_name_or_path) == ("ca", "mine/base")


def test_the_command_ends_with_the_error(convert):
    done = convert("gl", "--language", "gl")
    assert done.returncode == 1
    assert "no 'galician'" in done.stderr
