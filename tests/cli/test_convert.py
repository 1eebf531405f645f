"""`peft-clsr convert`: an expert of the reference implementation becomes an adapter."""

import pytest
import torch
from naver import checkpoint_of

from peft_clsr import CLSRConfig
from peft_clsr.cli import main


@pytest.fixture
def convert(tiny_whisper, tmp_path, capsys):
    """
    Runs the command on a checkpoint of Catalan; `convert("ca", "--language", "ca")` writes to the folder "ca".

    Returns output and errors that it printed.
    """

    def run(output_dir, *options, status=0):
        torch.save(checkpoint_of(tiny_whisper()), tmp_path / "expert.bin")
        try:
            ended = main(["convert", str(tmp_path / "expert.bin"), str(tmp_path / output_dir), *options])
        except SystemExit as error:
            ended = error.code
        printed = capsys.readouterr()
        assert ended == status, printed.err
        return printed

    return run


def test_the_command(convert, tmp_path):
    printed = convert("ca", "--language", "ca", "--base_model_name_or_path", "mine/base")
    assert printed.out == f"wrote {tmp_path / 'ca'}\n"
    config = CLSRConfig.from_pretrained(str(tmp_path / "ca"))
    assert (config.language, config.base_model_name_or_path) == ("ca", "mine/base")


def test_the_command_ends_with_the_error(convert):
    assert "no 'galician'" in convert("gl", "--language", "gl", status=1).err
