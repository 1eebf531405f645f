"""`examples/train_distilwhisper.py` from end to end on a tiny random Whisper and noise, and its bad input."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from peft import PeftModel
from transformers import WhisperForConditionalGeneration

SCRIPT = Path(__file__).parent.parent / "examples" / "train_distilwhisper.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("train_distilwhisper", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_distilwhisper"] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_distilwhisper"]


@pytest.fixture
def student(tiny_whisper, tiny_processor, tmp_path):
    folder = tmp_path / "student"
    tiny_whisper().save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture
def recordings(tmp_path):
    """A second of noise and less: four items to train on and two to test on, in Romanian, and one each in Catalan."""
    folder = tmp_path / "recordings"
    generator = np.random.default_rng(0)
    for split, size in (("train", 4), ("test", 2)):
        (folder / split).mkdir(parents=True)
        rows = ["file_name,transcription,language"]
        for i in range(size + 1):
            samples = generator.normal(0, 0.1, 4000 + 2000 * i).astype(np.float32)
            soundfile.write(folder / split / f"{i}.wav", samples, 16000)
            rows.append(f"{i}.wav,null {i},{'ca' if i == size else 'ro'}")
        (folder / split / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def run(script, student, recordings, tmp_path, monkeypatch, capsys):
    """Runs the script with the given further arguments; returns its exit status and what it printed."""

    def call(*arguments, languages=("ro",), dataset=None):
        command = ["train_distilwhisper.py", "--student", student, "--dataset", dataset or recordings]
        command += ["--languages", *languages, "--output_dir", tmp_path / "out", "--max_steps", 2, "--use_cpu"]
        command += ["--report_to", "none", "--per_device_train_batch_size", 2, "--gate_dim", 8, *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        try:
            script.main()
            status = 0
        except SystemExit as error:
            status = error.code
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


def test_two_languages_give_a_table_results_adapters_and_plots(run, student, tmp_path):
    status, printed = run("--teacher", student, "--max_new_tokens", 8, languages=("romanian", "ca"))
    assert status == 0, printed
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert set(results["languages"]) == {"ro", "ca"}
    for language, utterances in (("ro", 2), ("ca", 1)):
        row = results["languages"][language]
        assert row["train_items"]["kept"] == {"ro": 4, "ca": 1}[language]
        for when in ("base", "expert"):
            assert row[when]["utterances"] == utterances
            assert row[when]["wer"] >= 0 and row[when]["cer"] >= 0
        assert 0 < row["trainable_share"] < 1 and 0 <= row["gate_mean"] <= 1
        assert len(row["gate_means"]) == 4
        assert f"| {language} " in printed
        assert (out / f"gates-{language}.png").stat().st_size > 1000

        whisper = WhisperForConditionalGeneration.from_pretrained(student, dtype=torch.float32)
        model = PeftModel.from_pretrained(whisper, out, subfolder=language, adapter_name=language)
        assert model.peft_config[language].language == language
        assert sum(p.numel() for name, p in model.named_parameters() if "clsr_" in name) == row["trainable_parameters"]


def test_a_cached_teacher_teaches_as_the_teacher_itself(run, student, tmp_path):
    results = []
    for arguments in ((), ("--teacher_cache", tmp_path / "states", "--overwrite")):
        status, printed = run("--teacher", student, "--max_new_tokens", 8, "--max_audio_seconds", 1, *arguments)
        assert status == 0, printed
        results.append(json.loads((tmp_path / "out" / "results.json").read_text()))
    assert (tmp_path / "states" / "ro" / "teacher" / "teacher.json").exists()
    for name, mean in results[0]["languages"]["ro"]["gate_means"].items():
        assert results[1]["languages"]["ro"]["gate_means"][name] == pytest.approx(mean, abs=0.02)


def test_the_same_settings_again_show_the_table_without_training(run, tmp_path):
    assert run()[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    status, printed = run()
    assert status == 0 and "| ro " in printed and "--overwrite" in printed
    results = tmp_path / "out" / "results.json"
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    before.pop(results), after.pop(results)
    assert after == before
    status, printed = run(languages=("ro", "ca"))  # another language joins
    assert status == 0 and "| ro " in printed and "| ca " in printed


def test_results_of_other_settings_are_not_overwritten(run, tmp_path):
    assert run()[0] == 0
    results = tmp_path / "out" / "results.json"
    before = results.read_bytes()
    status, printed = run("--gate_budget", 0.25)
    assert status == 2
    assert "gate_budget 0.5 there, 0.25 here" in printed and "--overwrite" in printed
    assert results.read_bytes() == before
    assert run("--gate_budget", 0.25, "--overwrite")[0] == 0
    assert json.loads(results.read_text())["settings"]["gate_budget"] == 0.25


def test_an_adapter_from_elsewhere_is_not_overwritten(run, tmp_path):
    (tmp_path / "out" / "ro").mkdir(parents=True)
    adapter = tmp_path / "out" / "ro" / "adapter_config.json"
    adapter.write_text("{}")
    status, printed = run()
    assert status == 2 and str(adapter.parent) in printed and "--overwrite" in printed
    assert adapter.read_text() == "{}"


@pytest.mark.parametrize(
    ("arguments", "languages", "named"),
    [
        (("--gate_budget", 1.5), ("ro",), "gate_budget is 1.5"),
        (("--expert_rank", 0), ("ro",), "expert_rank is 0"),
        (("--kd_loss", "cosine"), ("ro",), "'cosine'"),
        (("--text_column", "sentence"), ("ro",), "'sentence'"),
        (("--eval_split", "dev"), ("ro",), "dev/metadata.csv"),
        (("--dataset_config", "a", "b"), ("ro",), "2 values of --dataset_config for 1 languages"),
        (("--teacher_cache", "states"), ("ro",), "give a --teacher"),
        ((), ("romanain",), "did you mean 'romanian'"),
        ((), ("el",), "no row of language 'el'"),
        (("--max_audio_seconds", 40), ("ro",), "40"),
        (("--student", "nobody/nothing"), ("ro",), "nobody/nothing"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(run, tmp_path, arguments, languages, named):
    status, printed = run(*arguments, languages=languages)
    assert status == 2
    assert named in printed and "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def test_a_dataset_that_is_neither_folder_nor_on_the_hub_is_named(run, tmp_path):
    status, printed = run(dataset="nobody/nothing")
    assert status == 2 and "nobody/nothing" in printed and not (tmp_path / "out").exists()
