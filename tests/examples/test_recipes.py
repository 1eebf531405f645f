"""`examples/recipes/` from end to end under `accelerate launch`, with a tiny Whisper and noise in the same columns."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import soundfile
from helpers import noise
from peft import PeftModel
from transformers import WhisperForConditionalGeneration

import peft_clsr  # noqa: F401  (PEFT then knows the adapters)

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


def write_noise(seed, target, rate, **kwargs):
    soundfile.write(target, noise(0.5, rate, seed), rate, **kwargs)


@pytest.fixture(scope="module")
def fleurs(tmp_path_factory):
    """As the Hub's conversion has it: CONFIG/SPLIT/0000.parquet, the audio in the rows, and names of languages."""
    root = tmp_path_factory.mktemp("fleurs")
    text = datasets.Value("string")
    stored = {"bytes": datasets.Value("binary"), "path": text}
    features = {"id": datasets.Value("int32"), "num_samples": datasets.Value("int32"), "path": text, "audio": stored}
    features |= {"transcription": text, "raw_transcription": text, "gender": datasets.ClassLabel(3), "language": text}
    features |= {"lang_id": datasets.ClassLabel(102), "lang_group_id": datasets.ClassLabel(7)}
    for config, language in (("ca_es", "Catalan"), ("ro_ro", "Romanian")):
        for split, size in (("train", 6), ("validation", 1), ("test", 2)):
            rows = []
            for i in range(size):
                write_noise(i, wav := io.BytesIO(), 16000, format="WAV")
                row = {"id": i, "num_samples": 8000, "path": f"{i}.wav", "transcription": f"frase {i}", "gender": 1}
                row |= {"audio": {"bytes": wav.getvalue(), "path": f"{i}.wav"}, "raw_transcription": f"Frase {i}."}
                rows.append(row | {"lang_id": 13, "language": language, "lang_group_id": 0})
            dataset = datasets.Dataset.from_list(rows, features=datasets.Features(features))
            (root / config / split).mkdir(parents=True)
            dataset.cast_column("audio", datasets.Audio(16000)).to_parquet(root / config / split / "0000.parquet")
    return root


@pytest.fixture(scope="module")
def common_voice(tmp_path_factory):
    """As Mozilla's archives unpack: LANGUAGE/SPLIT.tsv and LANGUAGE/clips/*.mp3."""
    root = tmp_path_factory.mktemp("cv-corpus-13.0-2023-03-09")
    columns = "client_id path sentence up_votes down_votes age gender accents variant locale segment".split()
    (root / "ca" / "clips").mkdir(parents=True)
    for split, size in (("train", 6), ("dev", 1), ("test", 2)):
        lines = ["\t".join(columns)]
        for i in range(size):
            path = f"common_voice_ca_{split}{i}.mp3"
            write_noise(i, root / "ca" / "clips" / path, 32000, format="MP3")
            # Quotes are not quotes of the format: one alone would swallow the lines after it.
            lines.append("\t".join([f"{i:064x}", path, f'"Frase {i}', "2", "0", "", "", "", "", "ca", ""]))
        (root / "ca" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture
def recipe(tiny_whisper, tiny_processor, tmp_path):
    """Runs a recipe with the given variables and options; returns what it printed, its results, and its folder."""
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny_whisper(seed=seed).save_pretrained(tmp_path / name)
        tiny_processor.save_pretrained(tmp_path / name)

    def call(name, *arguments, status=0, **variables):
        environment = {"STUDENT": tmp_path / "student", "TEACHER": tmp_path / "teacher", "OUTPUT": tmp_path / "out"}
        environment |= {"HF_DATASETS_CACHE": tmp_path / "cache", "ACCELERATE_USE_CPU": 1, **variables}
        environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        command = ["bash", RECIPES / name, *arguments]
        result = subprocess.run(
            [str(part) for part in command],
            env=os.environ | {key: str(value) for key, value in environment.items()},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        printed = result.stdout + result.stderr
        assert result.returncode == status, printed[-3000:]
        folder = tmp_path / "out" / environment.get("METHOD", "distil")
        results = folder / "results.json"
        return printed, json.loads(results.read_text()) if results.exists() else None, folder

    return call


SHORT = ("--max_steps", 2, "--logging_steps", 1, "--max_new_tokens", 4, "--use_cpu", "--dataloader_num_workers", 0)
PAPER = {"per_device_train_batch_size": 16, "learning_rate": 1e-4, "warmup_steps": 0.1, "adam_beta2": 0.98}
PAPER |= {"label_smoothing_factor": 0.1, "num_train_epochs": 10.0}
EXPERT = {"gate_budget": 0.5, "skip_gate_prob": 0.2, "expert_dropout": 0.3}
EXPERT |= {"straight_through": False, "expert_rank": None}


def losses(folder, language, name="loss"):
    (state,) = (folder / "checkpoints" / language).glob("checkpoint-2/trainer_state.json")
    return [log[name] for log in json.loads(state.read_text())["log_history"] if name in log]


def test_fleurs_by_distillation(recipe, fleurs, tmp_path):
    _, results, folder = recipe("fleurs.sh", "ca_es", "ro_ro", *SHORT, DATASET=fleurs)
    assert results["settings"].items() >= {**PAPER, **EXPERT, "teacher": str(tmp_path / "teacher")}.items()
    assert results["settings"]["kd_weight"] == 2.0
    assert set(results["languages"]) == {"ca", "ro"}
    for language, config in (("ca", "ca_es"), ("ro", "ro_ro")):
        row = results["languages"][language]
        assert row["dataset_config"] == config and row["train_steps"] == 2
        assert row["train_items"]["kept"] == 6 and row["eval_items"]["kept"] == row["expert"]["utterances"] == 2
        assert all(math.isfinite(loss) for loss in losses(folder, language))
        assert all(0 < loss < 1 for loss in losses(folder, language, "kd_loss"))
        assert (tmp_path / "out" / "teacher-states" / language / "teacher" / "teacher.json").is_file()


@pytest.mark.parametrize("method", ["clsr", "lora"])
def test_common_voice_without_a_teacher(recipe, common_voice, tmp_path, method):
    printed, results, folder = recipe("common_voice.sh", "ca", *SHORT, DATASET=common_voice, METHOD=method)
    row = results["languages"]["ca"]
    assert results["settings"].items() >= {**PAPER, "teacher": None, "most_upvoted": 10000}.items()
    assert row["train_items"]["kept"] == 6 and row["eval_items"]["kept"] == row["base"]["utterances"] == 2
    assert len(losses(folder, "ca")) == 2 and all(math.isfinite(loss) for loss in losses(folder, "ca"))
    student = WhisperForConditionalGeneration.from_pretrained(tmp_path / "student")
    config = PeftModel.from_pretrained(student, folder, subfolder="ca").peft_config["default"]
    if method == "clsr":
        assert results["settings"].items() >= EXPERT.items() and 0 <= row["gate_mean"] <= 1
        assert (config.gate_budget, config.skip_gate_prob, config.language) == (0.5, 0.2, "ca")
    else:
        assert "gate_mean" not in row and "| with LoRA " in printed
        assert (config.r, config.lora_alpha, config.lora_dropout) == (64, 64, 0.05)
        assert set(config.target_modules) == {"fc1", "fc2"}
        # fc1 and fc2 of 4 FFNs, 16 and 32 wide
        assert row["trainable_parameters"] == 4 * 2 * 64 * (16 + 32)


def test_the_batch_is_split_among_gpus_and_what_cannot_be_is_refused(recipe, common_voice):
    printed, results, _ = recipe("common_voice.sh", "ca", *SHORT, DATASET=common_voice, GPUS=3, status=2)
    assert "GPUS is '3', expected 1, 2, 4, 8 or 16" in printed and results is None
    printed, _, _ = recipe("common_voice.sh", "ca", METHOD="full", status=2)
    assert "METHOD is 'full', expected distil, clsr or lora" in printed
