"""`peft-clsr export`: what it prints and writes, and what it refuses."""

import json

import pytest
from freezing import EXPERT, MIXED, MODULES, SHARED


@pytest.mark.parametrize(("arguments", "positions"), [([], 50), (["--full_context"], 150)])
def test_the_command_exports_at_the_context_of_the_adapter_or_of_the_base(export, tmp_path, arguments, positions):
    status, printed = export([EXPERT, SHARED, MIXED, EXPERT], "--undecided", "majority", *arguments)
    assert status == 0, printed
    rows = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines()]
    names = {row[1] for row in rows if len(row) > 2}
    assert {"with the expert, routed", "frozen", "frozen, faster-whisper float32"} <= names
    assert ["", MODULES[1], "0.0", "0.0", "shared", ""] in rows
    assert json.loads((tmp_path / "out" / "whisper" / "config.json").read_text())["max_source_positions"] == positions
    names = {path.name for path in (tmp_path / "out" / "ctranslate2").iterdir()}
    assert {"model.bin", "config.json", "tokenizer.json", "preprocessor_config.json"} <= names


def test_the_command_writes_nothing_where_modules_are_left_routed(export, tmp_path):
    status, printed = export([EXPERT, SHARED, MIXED, EXPERT], "--undecided", "routed")
    assert status == 1 and "1 of 4 modules are left routed" in printed and "--undecided loss" in printed
    assert "| with the expert, routed | " in printed
    assert not (tmp_path / "out").exists()


def test_the_command_keeps_what_is_there_and_names_bad_values(export, tmp_path):
    for arguments, message in (
        (["--max_new_tokens", 225], "expected 1 to 224"),
        (["--threshold", 0.3], "threshold is 0.3"),
        (["--language", "uk"], "language 'uk' has no adapter"),
        (["--adapter", tmp_path / "base"], "adapter_config.json"),
        (["--adapter", tmp_path / "adaptors" / "ca"], f"did you mean '{tmp_path}/adapters/ca'"),
        (["--base", tmp_path / "adapters" / "ca"], "is an adapter, expected a whole Whisper"),
        (["--quantization", "int3"], "--quantization is 'int3', expected one of int8, "),
        (["--batch_size", 0], "--batch_size is 0"),
    ):
        status, printed = export([EXPERT] * 4, *arguments)
        assert status == 2 and message in printed, printed
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    status, printed = export([EXPERT] * 4)
    assert status == 2 and "out is not an empty folder" in printed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
