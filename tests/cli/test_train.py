"""`peft-clsr train` from end to end on a tiny random Whisper and noise, and its bad input."""

import json
import re
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from helpers import noise, random_clsr, write_container
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    GenerationConfig,
    Trainer,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from peft_clsr import (
    CLSRConfig,
    DistillationTrainer,
    DistillationTrainingArguments,
    load_recordings,
    pack_utterances,
    prepare_dataset,
    push_folder,
    read_languages,
    save_language,
    transcribe,
)
from peft_clsr.cli import main
from peft_clsr.cli.config_file import arguments_in_file
from peft_clsr.cli.joined import JoinedRecordings, divide
from peft_clsr.cli.run_folder import write_results
from peft_clsr.cli.table import results_rows
from peft_clsr.cli.train import make_parser
from peft_clsr.cli.train_data import row_reader
from peft_clsr.cli.train_options import DataArguments, ExpertArguments, LoraArguments, check_options
from peft_clsr.cli.train_packed import planned_epochs
from peft_clsr.cli.train_splits import held_out, load_test
from peft_clsr.data.split import MissingSplitError
from peft_clsr.data.votes import most_upvoted


@pytest.fixture
def student(tiny_whisper, tiny_processor, tmp_path):
    folder = tmp_path / "student"
    tiny_processor.tokenizer.add_tokens([f"<|{step / 50:.2f}|>" for step in range(151)])
    whisper = tiny_whisper()
    whisper.generation_config.max_length = 16  # noise makes a random model talk without end
    whisper.save_pretrained(folder)
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


@pytest.fixture(autouse=True)
def quick_plots(request, monkeypatch):
    """Plots are files without a picture, but in tests of plots: to draw two of them takes longer than a training."""
    if "plot" not in request.node.name:
        monkeypatch.setattr(
            "matplotlib.figure.Figure.savefig", lambda figure, path, **_: Path(path).write_text("plot")
        )


@pytest.fixture
def run(student, recordings, tmp_path, monkeypatch, capsys):
    """Runs the command with the given further arguments; returns its exit status and what it printed."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def call(*arguments, languages=("ro",), dataset=None, method=("--gate_dim", 8), device=("--use_cpu",)):
        command = ["train", "--student", student, "--dataset", dataset or recordings]
        command += ["--languages", *languages, "--output_dir", tmp_path / "out", "--max_steps", 2, *device]
        command += ["--report_to", "none", "--per_device_train_batch_size", 2, *method, *arguments]
        try:
            status = main([str(part) for part in command])
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


def test_a_teacher_with_more_mel_bins_teaches(run, student, tiny_whisper, tiny_processor, tmp_path):
    tiny_whisper(num_mel_bins=128, vocab_size=len(tiny_processor.tokenizer)).save_pretrained(tmp_path / "teacher")
    extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=1)
    WhisperProcessor(extractor, tiny_processor.tokenizer).save_pretrained(tmp_path / "teacher")
    status, printed = run("--teacher", tmp_path / "teacher", "--max_new_tokens", 8)
    assert status == 0, printed
    row = json.loads((tmp_path / "out" / "results.json").read_text())["languages"]["ro"]
    assert "teacher" in row and len(row["gate_means"]) == 4


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
    assert run("--gate_budget", 0.5)[0] == 0
    results = tmp_path / "out" / "results.json"
    before = results.read_bytes()
    status, printed = run("--gate_budget", 0.25)
    assert status == 2
    assert "gate_budget 0.5 there, 0.25 here" in printed and "--overwrite" in printed
    assert results.read_bytes() == before
    assert run("--gate_budget", 0.25, "--overwrite")[0] == 0
    assert json.loads(results.read_text())["settings"]["gate_budget"] == 0.25


def test_results_of_a_version_with_fewer_options_are_gone_on_with(run, tmp_path):
    assert run()[0] == 0
    results = tmp_path / "out" / "results.json"
    written = json.loads(results.read_text())
    assert written["settings"].pop("translate_with_shared_decoder") is False
    results.write_text(json.dumps(written))
    status, printed = run()
    assert status == 0 and "trained before with these settings" in printed
    assert run("--translate_with_shared_decoder", "true")[0] == 2


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
        (("--expert_rank", "all"), ("ro",), "--expert_rank is 'all', expected a number, or 'full'"),
        (("--exprt_rank", 4), ("ro",), "unrecognized arguments: --exprt_rank 4"),
        (("--kd_loss", "cosine"), ("ro",), "'cosine'"),
        (("--text_column", "sentence"), ("ro",), "'sentence'"),
        (("--eval_split", "dev"), ("ro",), "dev/metadata.csv"),
        (("--dataset_config", "ro_ro"), ("ro",), "ro_ro'"),
        (("--dataset_config", "a", "b"), ("ro",), "2 values of --dataset_config for 1 languages"),
        (("--teacher_cache", "states"), ("ro",), "give a --teacher"),
        (("--lora_rank", 4), ("ro",), "--gate_dim would do nothing"),
        (("--lora_rank", 4, "--teacher", "any"), ("ro",), "--teacher, --gate_dim would do nothing"),
        (
            ("--lora_rank", 4, "--kd_weight", 1, "--ce_weight", 2),
            ("ro",),
            "--gate_dim, --kd_weight, --ce_weight would",
        ),
        (("--ce_weight", 0), ("ro",), "--ce_weight is 0, and there is no distillation"),
        (("--ce_weight", 0, "--kd_weight", 0, "--teacher", "{here}/student"), ("ro",), "--ce_weight is 0, and there"),
        (("--lora_rank", 0), ("ro",), "--lora_rank is 0"),
        (("--lora_rank", 4, "--lora_dropout", 1), ("ro",), "--lora_dropout is 1.0"),
        ((), ("romanain",), "did you mean 'romanian'"),
        ((), ("el",), "no row of language 'el'"),
        (("--max_audio_seconds", 40), ("ro",), "40"),
        (("--max_audio_seconds", 0), ("ro",), "--max_audio_seconds is 0, expected at least 1"),
        (("--timestamps", 1.5), ("ro",), "--timestamps is 1.5, expected a share of windows from 0 to 1"),
        (("--single", "-0.1"), ("ro",), "--single is -0.1, expected a share of windows from 0 to 1"),
        (("--previous_text", "nan"), ("ro",), "--previous_text is nan, expected a share of windows from 0 to 1"),
        (("--student", "nobody/nothing"), ("ro",), "--student nobody/nothing cannot be used: it is no folder here"),
        (
            ("--student", "{here}/studnet"),
            ("ro",),
            "does not exist, expected a Whisper: a folder; did you mean '{here}/student'",
        ),
        (("--teacher", "{here}/teacher"), ("ro",), "--teacher '{here}/teacher' does not exist, expected a Whisper"),
        (("--dataset", "./recodrings"), ("ro",), "--dataset './recodrings' does not exist, expected a dataset"),
        (("--dataset", "./foaie.csv"), ("ro",), "does not exist, expected a dataset: a folder or a table"),
        (
            ("--output_dir", "{here}/student/config.json/out"),
            ("ro",),
            "would be in {here}/student/config.json, which is a file",
        ),
        (("--max_train_samples", 0), ("ro",), "--max_train_samples is 0, expected at least 1"),
        (("--per_device_eval_batch_size", 0), ("ro",), "--per_device_eval_batch_size is 0, expected at least 1"),
        (("--max_new_tokens", 0), ("ro",), "--max_new_tokens is 0, expected at least 1"),
        (("--learning_rate", "-1"), ("ro",), "--learning_rate is -1.0, expected more than 0"),
        (("--max_steps", "-1", "--num_train_epochs", 0), ("ro",), "--num_train_epochs is 0.0, expected more than 0"),
        (("--exclude_modules", "["), ("ro",), "--exclude_modules '[' is no regular expression"),
        ((), ("yo",), "has no token for the language yo"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(run, tmp_path, arguments, languages, named):
    here = str(tmp_path)
    status, printed = run(*(str(argument).replace("{here}", here) for argument in arguments), languages=languages)
    assert status == 2
    assert named.replace("{here}", here) in printed and "Traceback" not in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("context", [(), ("--max_audio_seconds", 1)])
def test_a_test_set_that_cannot_be_scored_is_refused_before_training(run, recordings, tmp_path, monkeypatch, context):
    monkeypatch.setattr("peft_clsr.cli.train_language.transcribe", lambda *args, **kwargs: pytest.fail("too late"))
    table = recordings / "test" / "metadata.csv"
    table.write_text(re.sub(r"null \d", "...", table.read_text()))
    status, printed = run(*context)
    assert status == 2 and not (tmp_path / "out").exists()
    assert (
        "none of the 2 references in 'ro' can be scored, all normalize to nothing, such as '...' (rows 0, 1)"
        in printed
    )


def test_results_with_a_number_that_is_not_finite_are_json(tmp_path):
    write_results({"settings": {}, "languages": {"ro": {"gate_mean": float("nan")}}}, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)["languages"] == {
        "ro": {"gate_mean": None}
    }


def test_the_table_has_cer_in_bold_where_it_is_the_rate_to_read():
    rates = {"wer": 1.0, "cer": 0.123, "utterances": 3}
    row = {"base": rates, "trainable_parameters": 10**6, "trainable_share": 0.1}
    results = {"settings": {}, "languages": {"ja": row, "ro": row}}
    assert results_rows(results, "ja")[0][3:5] == ["100.0", "**12.3**"]
    assert results_rows(results, "ro")[0][3:5] == ["100.0", "12.3"]


def test_a_model_that_is_divided_over_processes_is_refused(tmp_path, monkeypatch):
    training = DistillationTrainingArguments(str(tmp_path), use_cpu=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp divides the model over processes.*start it with accelerate launch"):
        check_options(DataArguments("base", "data", ["ro"]), ExpertArguments(), LoraArguments(), training)


def test_choosing_by_wer_in_a_language_without_spaces_is_warned_of(tmp_path, caplog):
    for languages, metric, said in (
        (["ja", "ro"], "eval_wer", True),
        (["ja"], "error_rate", False),
        (["ro"], "wer", False),
    ):
        caplog.clear()
        data = DataArguments("base", "data", languages)
        training = DistillationTrainingArguments(str(tmp_path), metric_for_best_model=metric, use_cpu=True)
        check_options(data, ExpertArguments(), LoraArguments(), training)
        assert ("takes whole utterances as words in ja" in caplog.text) == said


def test_a_base_that_cannot_be_trained_is_named_before_features_are_computed(run, student, tiny_whisper, tmp_path):
    get_peft_model(tiny_whisper(), CLSRConfig.paper(language="ca")).save_pretrained(tmp_path / "adapter")
    status, printed = run("--student", tmp_path / "adapter")
    assert status == 2 and f"--student {tmp_path / 'adapter'} is an adapter, expected a whole Whisper" in printed
    path = student / "generation_config.json"
    current = GenerationConfig.from_pretrained(student)
    path.unlink()
    for option in ("--student", "--teacher"):
        status, printed = run(option, student)
        assert status == 2 and f"{student} is a multilingual Whisper with an outdated generation config" in printed
        assert "context: " not in printed and not (tmp_path / "out").exists()
    current.is_multilingual = False
    current.save_pretrained(student)
    status, printed = run()
    assert status == 2 and f"--student {student} knows English only" in printed


def test_a_dataset_that_is_neither_folder_nor_on_the_hub_is_named(run, tmp_path):
    status, printed = run(dataset="nobody/nothing")
    assert status == 2 and "nobody/nothing" in printed and not (tmp_path / "out").exists()


LORA = ("--lora_rank", 4, "--lora_alpha", 8)


def test_lora_starts_from_the_smoothed_loss_of_the_base(run, student, recordings, tiny_processor, tmp_path):
    options = ("--label_smoothing_factor", 0.1, "--per_device_train_batch_size", 4, "--logging_steps", 1)
    options += ("--pack", "False")
    status, printed = run(*options, "--save_steps", 1, "--keep_checkpoints", method=LORA)
    assert status == 0, printed
    assert "| with LoRA " in printed and not (tmp_path / "out" / "gates-ro.png").exists()
    log = json.loads((tmp_path / "out/checkpoints/ro/checkpoint-2/trainer_state.json").read_text())["log_history"]

    audio = [str(recordings / "train" / f"{i}.wav") for i in range(4)]
    rows = {"audio": audio, "transcription": [f"null {i}" for i in range(4)]}
    batch = prepare_dataset(datasets.Dataset.from_dict(rows), tiny_processor, "ro")[0][:4]
    labels = torch.nn.utils.rnn.pad_sequence(batch["labels"], batch_first=True, padding_value=-100)
    with torch.no_grad():
        whisper = WhisperForConditionalGeneration.from_pretrained(student, dtype=torch.float32)
        logits = whisper(input_features=batch["input_features"], labels=labels).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    assert log[0]["loss"] == pytest.approx(loss.item(), abs=1e-3)


def test_the_alpha_of_lora_is_its_rank(run, tmp_path):
    status, printed = run("--max_steps", 1, method=("--lora_rank", 4))
    assert status == 0, printed
    assert config_of(tmp_path / "out" / "ro").items() >= {"r": 4, "lora_alpha": 4}.items()


def test_lora_goes_on_from_its_last_checkpoint(run, tmp_path):
    """And evaluates by generation, as experts do."""
    options = ("--save_steps", 1, "--predict_with_generate", "--eval_strategy", "steps", "--eval_steps", 1)
    options += (
        "--generation_max_length",
        8,
        "--keep_checkpoints",
        "--validation_split",
        "validation",
        "--save_total_limit",
        2,
    )
    assert run(*options, method=LORA)[0] == 0
    out = tmp_path / "out"
    whole = load_file(out / "ro" / "adapter_model.safetensors")
    checkpoint = out / "checkpoints" / "ro" / "checkpoint-1" / "trainer_state.json"
    saved = checkpoint.stat().st_mtime_ns
    for path in (out / "ro", out / "checkpoints" / "ro" / "checkpoint-2"):
        shutil.rmtree(path)
    unfinished = {"ro": {"dataset_config": None, "eval_config": None}}
    write_results({**results_of(out), "languages": {}, "unfinished": unfinished}, out)
    status, printed = run(*options, "--resume_from_checkpoint", "true", method=LORA)
    assert status == 0, printed
    resumed = load_file(out / "ro" / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys() and checkpoint.stat().st_mtime_ns == saved
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    state = json.loads((out / "checkpoints/ro/checkpoint-2/trainer_state.json").read_text())
    assert len([log for log in state["log_history"] if "eval_wer_ro" in log]) == 2


def test_a_spreadsheet_without_splits_trains_on_a_part_of_it(run, recordings, tmp_path, caplog):
    """A csv of a Romanian Windows, with its own columns; recordings of two languages from a phone are in a folder."""
    rows = [f"{i};Ţara {'abcdef'[i]};x;{'ca' if i == 3 else 'RO'}" for i in range(5)]
    (tmp_path / "ro" / "audio").mkdir(parents=True)
    for i in range(5):
        write_container(tmp_path / "ro" / "audio" / f"{i}.m4a", noise(0.5, seed=i), 16000, "aac")
    sheet = tmp_path / "ro" / "foaie.csv"
    sheet.write_bytes("\r\n".join(["Nume;Text;Note; Language", *rows, ""]).encode("cp1250"))
    status, printed = run("--file_column", "nume", "--text_column", "Text", dataset=tmp_path / "{language}/foaie.csv")
    assert status == 0, printed
    assert str(tmp_path) not in (tmp_path / "out" / "ro" / "language.json").read_text()
    row = results_of(tmp_path / "out")["languages"]["ro"]
    assert (row["train_items"]["kept"], row["eval_items"]["kept"]) == (2, 1)
    said = [record.getMessage() for record in caplog.records if "foaie.csv" in record.getMessage()]
    parts = (
        "is read as cp1250",
        "4 rows of ro; of other languages, not used: 1 of ca",
        "2 train, 1 validation, 1 test",
    )
    assert len(said) == 3 and all(part in message for part, message in zip(parts, said, strict=True))


def test_a_long_recording_with_subtitles_is_trained_on(run, tmp_path):
    folder = tmp_path / "talks"
    folder.mkdir()
    soundfile.write(folder / "talk.mp3", noise(15.0), 16000)
    cues = [f"{k}\n00:00:{k:02},000 --> 00:00:{k:02},{5 + k % 4}00\nunu {k}\n" for k in range(12)]
    (folder / "talk.srt").write_text("\n".join(cues))
    status, printed = run(dataset=folder)
    assert status == 0, printed
    row = results_of(tmp_path / "out")["languages"]["ro"]
    assert (row["train_items"]["kept"], row["eval_items"]["kept"]) == (10, 1)


def test_a_recording_that_was_replaced_is_heard_anew(run, recordings, tmp_path):
    kept = []
    for _ in range(2):
        assert run("--overwrite", "--max_train_samples", 3, "--allow_dropped")[0] == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        kept.append(results["languages"]["ro"]["train_items"]["kept"])
        soundfile.write(recordings / "train" / "0.wav", np.zeros(40000), 16000)  # longer than the context
    assert kept == [3, 2]


@pytest.mark.parametrize(
    ("revision", "where"),
    [
        (None, {"path": "google/fleurs", "name": "ca_es"}),
        ("v1", {"path": "google/fleurs", "name": "ca_es"}),
        ("refs/convert/parquet", {"path": "google/fleurs", "data_dir": "ca_es"}),
    ],
)
def test_what_the_hub_converted_has_folders_for_configurations(monkeypatch, revision, where):
    called = {}

    def load_dataset(**kwargs):
        called.update(kwargs)
        return datasets.Dataset.from_dict({"transcription": ["bon dia"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_recordings("google/fleurs", "ca", "train", config="ca_es", revision=revision)
    assert called == {**where, "split": "train", "revision": revision}


def test_the_revision_of_the_dataset_is_not_that_of_a_test_set_on_this_machine(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(
        "peft_clsr.cli.train_splits.load_recordings",
        lambda name, *args, revision, **kwargs: (
            called.append((name, revision)) or datasets.Dataset.from_dict({"transcription": ["bon dia"]})
        ),
    )
    for eval_dataset in (None, "me/test", str(tmp_path)):
        data = DataArguments("tiny", "google/fleurs", ["ca"], dataset_revision="v1", eval_dataset=eval_dataset)
        load_test(data, "ca", None)
    assert called == [("google/fleurs", "v1"), ("me/test", "v1"), (str(tmp_path), None)]


def test_a_dataset_that_is_a_script_points_to_what_the_hub_converted(monkeypatch):
    def load_dataset(**kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found fleurs.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="no longer supported.*--dataset_revision refs/convert/parquet"):
        load_recordings("google/fleurs", "ca", "train", config="ca_es")


# ----------------------------------------------------------------------------------------- defaults, context, folders


@pytest.fixture
def longer_student(tiny_whisper, tiny_processor, student):
    """The student, at a context of 3 s."""
    extractor = WhisperFeatureExtractor(chunk_length=3)
    tiny_whisper(max_source_positions=150).save_pretrained(student)
    WhisperProcessor(extractor, tiny_processor.tokenizer).save_pretrained(student)
    return student


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_defaults_suit_some_hundred_recordings(run, tmp_path):
    status, printed = run(method=())
    assert status == 0, printed
    config = config_of(tmp_path / "out" / "ro")
    expected = {"expert_rank": 32, "straight_through": True, "gate_budget": 1.0, "skip_gate_prob": 0.0}
    assert config.items() >= {**expected, "gate_noise": 0.0, "expert_dropout": 0.0, "max_audio_seconds": None}.items()
    settings = results_of(tmp_path / "out")["settings"]
    assert settings.items() >= {**expected, "learning_rate": 2e-3, "warmup_steps": 0.1, "adam_beta2": 0.98}.items()
    assert "'loss': " in printed  # of the first step


@pytest.mark.skipif(torch.accelerator.is_available(), reason="trains on the GPU")
def test_without_a_gpu_training_in_bfloat16_needs_no_second_option(run, tmp_path):
    status, printed = run("--bf16", device=())
    assert status == 0, printed
    settings = json.loads((tmp_path / "out/results.json").read_text())["settings"]
    assert settings["bf16"] is True and "use_cpu" not in settings
    assert run("--bf16", "--use_cpu", device=())[0] == 0  # no other setting


def test_a_full_expert_has_no_rank(run, tmp_path):
    assert run("--expert_rank", "full")[0] == 0
    assert config_of(tmp_path / "out" / "ro")["expert_rank"] is None
    assert results_of(tmp_path / "out")["settings"]["expert_rank"] is None


def test_recordings_are_packed_to_windows_of_the_whole_context(run, longer_student, recordings, tmp_path):
    status, printed = run("--timestamps", 0.5, "--max_steps", -1, "--num_train_epochs", 2)
    assert status == 0, printed
    assert "ro, training: 4 kept; 1 windows an epoch, of 1.8 s of speech on average" in printed
    row = results_of(tmp_path / "out")["languages"]["ro"]
    assert row["train_steps"] == 2 and row["train_items"]["kept"] == 4 and "base_full_context" not in row
    assert config_of(tmp_path / "out" / "ro")["max_audio_seconds"] is None
    settings = results_of(tmp_path / "out")["settings"]
    assert settings.items() >= {"pack": True, "timestamps": 0.5, "single": 0.1, "previous_text": 0.1}.items()


def test_shares_of_windows_are_those_that_are_asked_for(run, tmp_path, monkeypatch):
    asked = {}

    def pack(*arguments, **options):
        asked.setdefault("first", options)  # later ones are held out, for the gates
        return pack_utterances(*arguments, **options)

    monkeypatch.setattr("peft_clsr.cli.train_packed.pack_utterances", pack)
    status, printed = run("--timestamps", 0.25, "--single", 1, "--previous_text", 0, "--seed", 3)
    assert status == 0, printed
    assert asked["first"].items() >= {"timestamps": 0.25, "single": 1, "previous_text": 0, "seed": 3}.items()
    assert "4 windows an epoch" in printed


def test_without_packing_each_recording_is_a_row(run, tmp_path):
    status, printed = run("--pack", "False", "--max_steps", -1, "--num_train_epochs", 1)
    assert status == 0, printed
    assert "windows an epoch" not in printed
    row = results_of(tmp_path / "out")["languages"]["ro"]
    assert row["train_steps"] == 2 and row["base_joined"]["recordings"] == 1  # 4 recordings, 2 a batch


def test_what_fits_no_window_is_named_and_counted(run, longer_student, recordings, tmp_path, caplog):
    soundfile.write(recordings / "train" / "0.wav", np.zeros(50000), 16000)  # longer than the context
    path = recordings / "train" / "1.wav"
    soundfile.write(path, noise(0.5), 16000, format="FLAC")
    path.write_bytes(path.read_bytes()[:8000])
    status, printed = run()
    assert status == 2 and not (tmp_path / "out").exists()
    assert "ro, training: 3 of 4 recordings can be used (1 too_long; item 0, " in printed
    assert "1 of 4 items cannot be used (1 too_long), more than 10% of them: item 0, " in printed
    assert f"{recordings / 'train' / '0.wav'}: 3.1 s of audio, longer than the context of 3 s" in printed
    status, printed = run("--allow_dropped")
    assert status == 0, printed
    row = results_of(tmp_path / "out")["languages"]["ro"]
    items = row["train_items"]
    assert (items["kept"], items["too_long"], items["unreadable"]) == (2, 1, 1)
    dropped = [record.getMessage() for record in caplog.records if "dropped: " in record.getMessage()]
    assert len([text for text in dropped if "1.wav" in text]) == 1  # a header tells nothing of its end


def test_recordings_without_speech_may_be_longer_than_a_window(run, recordings, tmp_path):
    soundfile.write(recordings / "train" / "room.wav", noise(3.0), 16000)
    with (recordings / "train" / "metadata.csv").open("a") as table:
        table.write("room.wav,,ro\n")
    status, printed = run("--no_speech", 0.4)
    assert status == 0 and "ro, training: 5 of 5 recordings can be used (none dropped)" in printed, printed
    assert results_of(tmp_path / "out")["languages"]["ro"]["train_items"]["kept"] == 5
    status, printed = run("--no_speech", 0.4, "--pack", "False", "--overwrite")
    assert status == 2 and "recordings are not packed, so --no_speech changes nothing" in printed
    assert "ro, training: 4 of 5 recordings can be used (1 no_text" in printed


def test_a_cut_context_has_rows_and_both_measures_of_the_base(run, longer_student, recordings, tmp_path):
    status, printed = run("--max_audio_seconds", 2)
    assert status == 0, printed
    assert "context: 2 s; recordings are not packed" in printed and "windows an epoch" not in printed
    row = results_of(tmp_path / "out")["languages"]["ro"]
    assert "base_full_context" in row and not [key for key in row if "joined" in key]
    assert "| base, 2 s context " in printed
    assert config_of(tmp_path / "out" / "ro")["max_audio_seconds"] == 2

    status, printed = run(languages=("ro", "ca"))  # one model takes both adapters
    assert status == 2 and "max_audio_seconds 2 there, None here" in printed


def test_the_whole_context_can_be_asked_for(run, longer_student, tmp_path):
    status, printed = run("--max_audio_seconds", 3)
    assert status == 0 and "windows an epoch" in printed
    assert "base_full_context" not in results_of(tmp_path / "out")["languages"]["ro"]
    assert config_of(tmp_path / "out" / "ro")["max_audio_seconds"] is None


def test_the_end_of_packed_recordings_is_not_cut(run, tmp_path):
    status, printed = run("--long_audio", "cut")
    assert status == 2 and not (tmp_path / "out").exists()
    assert "--long_audio cut keeps the beginning of a long recording" in printed and "--pack False" in printed
    assert run("--long_audio", "cut", "--pack", "False")[0] == 0


def test_options_of_packing_that_change_nothing_are_named(run):
    status, printed = run("--pack", "False", "--single", 0.5, "--no_speech", 0.1)
    assert status == 0 and "recordings are not packed, so --single, --no_speech change nothing" in printed
    assert "change nothing" not in run("--pack", "False", "--overwrite")[1]


LORA_ALONE = "an expert is trained, not LoRA (--lora_rank), so --lora_alpha, --lora_dropout change nothing"
NO_TEACHER = "there is no --teacher, so --kd_weight, --kd_loss, --temperature change nothing"
NO_STEPS = "no evaluation is by steps (--eval_strategy steps), so --eval_steps changes nothing"
SAVED = "a checkpoint is saved at each evaluation, so "
VALIDATION = ("--validation_split", "dev")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--lora_alpha", 4, "--lora_dropout", 0), [LORA_ALONE]),
        (("--kd_weight", 1, "--kd_loss", "kl", "--temperature", 2), [NO_TEACHER]),
        (("--eval_steps", 5), [NO_STEPS]),
        ((*VALIDATION, "--eval_steps", 5), [NO_STEPS]),
        ((*VALIDATION, "--save_steps", 5, "--save_strategy", "no"), [f"{SAVED}--save_strategy, --save_steps change"]),
        (
            (*VALIDATION, "--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 4),
            [f"{SAVED}--save_steps changes nothing"],
        ),
        ((*VALIDATION, "--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 2), []),
        ((*VALIDATION, "--save_strategy", "epoch"), []),
        (("--save_strategy", "epoch", "--ce_weight", 0.5), []),
        (("--teacher", "large", "--kd_weight", 1, "--kd_loss", "kl", "--temperature", 2, "--ce_weight", 0), []),
        (("--lora_rank", 4, "--lora_alpha", 4, "--lora_dropout", 0), []),
        (("--config", "examples/recipes/lora.yaml"), []),
        (("--config", "examples/recipes/paper.yaml"), ["there is no --teacher, so --kd_weight changes nothing"]),
        ((), []),
    ],
)
def test_options_that_change_nothing_are_named_once(tmp_path, capsys, options, said):
    command = ["--student", "base", "--dataset", "data", "--languages", "ro", "--output_dir", tmp_path, "--use_cpu"]
    if "--config" in options:
        parser = make_parser("train", everything=True)
        options = arguments_in_file(str(Path(__file__).parents[2] / options[1]), parser)[1]
    parser = make_parser("train", everything=True)
    check_options(*parser.parse_args_into_dataclasses([str(part) for part in (*command, *options)]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(said) and all(line.startswith(start) for line, start in zip(lines, said, strict=True))


# ----------------------------------------------------------------------------------------------------------- languages


def test_a_language_that_whisper_does_not_know_is_trained_under_another_ones_token(run, recordings, tmp_path):
    for table in recordings.rglob("metadata.csv"):
        table.write_text(table.read_text().replace(",ro", ",Upper Sorbian"))
    status, printed = run(languages=["hsb"])
    assert status == 2 and "Whisper has no language 'hsb': name the Whisper language" in printed
    assert "--prompt_language" in printed and not (tmp_path / "out").exists()
    status, printed = run("--prompt_language", "ca", "ro", languages=["hsb"])
    assert status == 2 and "2 values of --prompt_language for 1 languages" in printed
    status, printed = run("--prompt_language", "Romanian", languages=["hsb"])
    assert status == 0, printed
    assert list(results_of(tmp_path / "out")["languages"]) == ["hsb"]
    (language,) = read_languages(tmp_path / "out")
    assert (language.code, language.subfolder, language.prompt_language) == ("hsb", "hsb", "ro")
    assert "| hsb " in printed


# --------------------------------------------------------------------------------------------------- joined recordings


def test_the_table_has_a_row_for_joined_recordings(run, tmp_path):
    status, printed = run()
    assert status == 0, printed
    row = results_of(tmp_path / "out")["languages"]["ro"]
    for key in ("base", "expert"):
        assert row[f"{key}_joined"]["utterances"] == row[key]["utterances"] == 2
        assert row[f"{key}_joined"]["recordings"] == 1 and row[f"{key}_joined"]["wer"] >= 0
    assert (
        "within 0.5 s" in printed
        and "| base, joined to about a minute " in printed
        and "| with expert, joined to about a minute " in printed
    )


def test_utterances_are_joined_in_order_to_recordings_of_about_a_minute(student, tiny_processor):
    lengths = [1, 3, 2, 2.5, 0.5] * 10
    texts = [f"text {index}" for index in range(50)]
    audio = [{"array": np.full(round(16000 * seconds), 0.5), "sampling_rate": 16000} for seconds in lengths]
    dataset = datasets.Dataset.from_dict({"audio": audio, "transcription": texts})
    joined = JoinedRecordings(
        dataset, row_reader(dataset, tiny_processor, "ro", DataArguments(student, "", ["ro"]), "eval")
    )
    assert len(joined) == 2 and joined.utterances == 50  # 90 s of speech and 20 s of silence
    assert " ".join(joined.texts) == " ".join(texts)
    starts, ends = zip(*joined.times[0], strict=True)
    assert starts[:2] == (0.0, pytest.approx(lengths[0] + 0.4)) and ends[0] == pytest.approx(lengths[0])
    seconds = [len(joined.waveform(index, 16000)) / 16000 for index in range(2)]
    assert sum(seconds) == pytest.approx(110) and min(seconds) > 50
    assert joined.waveform(0, 16000)[16000 : 16000 + 6400].max() == 0 and joined.waveform(0, 16000)[16000 + 6400] > 0.4


@pytest.mark.parametrize(
    ("seconds", "parts"), [([10], [[0]]), ([100, 1, 1], [[0], [1, 2]]), ([20] * 6, [[0, 1, 2], [3, 4, 5]])]
)
def test_parts_are_of_about_a_length(seconds, parts):
    assert divide(seconds, 60) == parts


# ------------------------------------------------------------------------------------- the epochs of a teacher's cache


@pytest.mark.parametrize(
    ("windows", "arguments", "epochs"),
    [
        (10, {"num_train_epochs": 2.5}, 3),
        (10, {"max_steps": 20}, 2),
        (10, {"max_steps": 21}, 3),
        (10, {"max_steps": 8, "per_device_train_batch_size": 3}, 2),
        (10, {"max_steps": 8, "per_device_train_batch_size": 3, "dataloader_drop_last": True}, 3),
        (10, {"max_steps": 8, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, 4),
    ],
)
def test_the_teacher_is_cached_for_the_epochs_of_the_training(tmp_path, windows, arguments, epochs):
    settings = {"per_device_train_batch_size": 1, "use_cpu": True, **arguments}
    training = DistillationTrainingArguments(str(tmp_path), **settings)
    assert planned_epochs(training, windows) == epochs
    trainer = Trainer(torch.nn.Linear(1, 1), training, train_dataset=[{"x": 0}] * windows)
    assert trainer.set_initial_training_values(training, trainer.get_train_dataloader())[0] == epochs


def test_a_cached_teacher_teaches_packed_windows_in_all_epochs(run, student, tmp_path):
    options = ("--teacher", student, "--max_new_tokens", 8, "--single", 1, "--previous_text", 1)
    options += ("--max_steps", -1, "--num_train_epochs", 2, "--overwrite")
    results = []
    for cache in ((), ("--teacher_cache", tmp_path / "states")):
        status, printed = run(*options, *cache)
        assert status == 0, printed
        results.append(results_of(tmp_path / "out")["languages"]["ro"])
    header = json.loads((tmp_path / "states" / "ro" / "teacher" / "teacher.json").read_text())
    assert header["windows"]["epochs"] == 2 and header["examples"] == 8
    assert results[1]["train_steps"] == 4 and "teacher_joined" in results[1]
    for name, mean in results[0]["gate_means"].items():
        assert results[1]["gate_means"][name] == pytest.approx(mean, abs=0.02)
    status, printed = run(*options, "--teacher_cache", tmp_path / "states", "--seed", 1)
    assert status == 2 and "is of packed windows whose seed is 42, expected 1: give another cache_dir" in printed


def test_checkpoints_of_a_finished_language_are_removed(run, tmp_path):
    assert run("--save_steps", 1)[0] == 0
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert run("--save_steps", 1, "--keep_checkpoints", "--overwrite")[0] == 0
    names = {path.name for path in (tmp_path / "out" / "checkpoints" / "ro").iterdir()}
    assert names == {"checkpoint-1", "checkpoint-2"}


def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(run, tmp_path, monkeypatch):
    assert run("--save_steps", 1)[0] == 0
    whole = load_file(tmp_path / "out" / "ro" / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "out")

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("peft_clsr.cli.train_language.gate_means", stop)
        with pytest.raises(KeyboardInterrupt):
            run("--save_steps", 1)
    checkpoints = tmp_path / "out" / "checkpoints" / "ro"
    shutil.rmtree(checkpoints / "checkpoint-2")
    shutil.rmtree(tmp_path / "out" / "ro")
    assert run("--resume_from_checkpoint", "true")[0] == 0  # how often it saves is no setting of the results
    resumed = load_file(tmp_path / "out" / "ro" / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not checkpoints.exists()


@pytest.fixture
def killed(run, monkeypatch):
    """Runs the command until it has trained, and ends it as SIGKILL would: nothing is saved but checkpoints."""

    def stop(*arguments):
        raise KeyboardInterrupt

    def call(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr("peft_clsr.cli.train_language._LanguageTraining._save_weights", stop)
            with pytest.raises(KeyboardInterrupt):
                run("--save_steps", 1, *arguments, **options)

    return call


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_checkpoints_of_other_settings_are_not_gone_on_with(run, killed, recordings, tmp_path):
    out, resume = tmp_path / "out", ("--save_steps", 1, "--resume_from_checkpoint", "true")
    killed()
    before = files_of(out)
    for options, named in (
        (("--learning_rate", 0.5), "learning_rate 0.002 there, 0.5 here"),
        (("--dataset_config", "other"), "holds a training of ro on None, not 'other'"),
    ):
        status, printed = run(*resume, *options)
        assert status == 2 and named in printed and "--overwrite" in printed, printed
    status, printed = run("--save_steps", 1)  # those of the same settings would be lost
    assert status == 2 and "a training that was stopped: give --resume_from_checkpoint true" in printed, printed
    assert files_of(out) == before
    status, printed = run(*resume)
    assert status == 0 and results_of(out)["unfinished"] == {}, printed


def test_checkpoints_whose_settings_are_unknown_are_not_gone_on_with(run, killed, tmp_path):
    out = tmp_path / "out"
    killed()
    (out / "results.json").unlink()
    before = files_of(out)
    for options in ((), ("--resume_from_checkpoint", "true")):
        status, printed = run(*options)
        assert status == 2 and f"{out / 'checkpoints' / 'ro'} holds checkpoints of unknown settings" in printed
        assert "--overwrite" in printed and files_of(out) == before


def test_what_is_overwritten_leaves_no_checkpoints(run, killed, tmp_path):
    out = tmp_path / "out"
    status, printed = run("--overwrite", "--resume_from_checkpoint", "true")
    assert status == 2 and "--overwrite starts anew, and --resume_from_checkpoint true goes on" in printed
    killed(languages=("ca",))
    killed(languages=("ro",))
    assert set(results_of(out)["unfinished"]) == {"ca", "ro"}
    killed("--overwrite", "--save_steps", 2, "--learning_rate", 0.5, languages=("ro", "ca"))
    assert {path.name for path in (out / "checkpoints").glob("*/*")} == {"checkpoint-2"}
    assert set(results_of(out)["unfinished"]) == {"ro"}
    options = ("--resume_from_checkpoint", "true", "--learning_rate", 0.5)
    status, printed = run(*options, languages=("ro", "ca"))  # as it was stopped in the first language
    assert status == 0 and set(results_of(out)["languages"]) == {"ro", "ca"}, printed


def unable(*arguments, **options):
    raise RuntimeError("unable")


def without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def with_an_error_of_matplotlib(monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", unable)


@pytest.mark.parametrize(
    ("break_plots", "named"), [(without_matplotlib, "peft_clsr[plots]"), (with_an_error_of_matplotlib, "unable")]
)
def test_without_a_plot_everything_else_is_saved(run, tmp_path, monkeypatch, caplog, break_plots, named):
    break_plots(monkeypatch)
    status, printed = run()
    assert status == 0 and "| ro " in printed
    (warning,) = [record.getMessage() for record in caplog.records if "plot_gate_means" in record.getMessage()]
    assert named in warning and "plot_gate_means" in warning
    assert results_of(tmp_path / "out")["languages"]["ro"]["gate_means"]
    (language,) = read_languages(tmp_path / "out")
    assert language.code == "ro" and not language.has_plot and (tmp_path / "out" / "README.md").is_file()
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.parametrize("part", ["gate_means", "transcribe"])
def test_the_adapter_is_saved_before_it_is_measured(run, tmp_path, monkeypatch, part):
    module, calls = "peft_clsr.cli.train_language", []

    def fail_after_training(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1 and part == "transcribe":  # the base is measured first
            return transcribe(*arguments, **options)
        raise RuntimeError("unable")

    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{part}", fail_after_training)
        with pytest.raises(RuntimeError, match="unable"):
            run("--save_steps", 1)
    saved = load_file(tmp_path / "out" / "ro" / "adapter_model.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in saved.items() if "expert_B" in name)  # trained: starts at 0
    assert results_of(tmp_path / "out")["languages"] == {}
    assert run("--save_steps", 1, "--resume_from_checkpoint", "true")[0] == 0  # the folder is known as its own
    again = load_file(tmp_path / "out" / "ro" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_a_card_that_cannot_be_written_costs_no_results(run, tmp_path, caplog):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("---\n[: no YAML\n---\n")
    assert run()[0] == 0
    assert results_of(tmp_path / "out")["languages"]["ro"]["expert"]["utterances"] == 2
    assert (tmp_path / "out" / "ro" / "adapter_model.safetensors").is_file()
    assert "README.md cannot be read" in caplog.text


def test_an_interruption_keeps_the_weights_of_the_last_step(run, tmp_path, monkeypatch, caplog):
    compute_loss, calls = DistillationTrainer.compute_loss, []

    def interrupt_in_the_second_step(self, model, *arguments, **options):
        calls.append(model.training)
        if calls.count(True) == 2:
            raise KeyboardInterrupt
        return compute_loss(self, model, *arguments, **options)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", interrupt_in_the_second_step)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert (tmp_path / "out" / "ro" / "adapter_model.safetensors").is_file()
    assert "stopped after 1 of 2 steps (KeyboardInterrupt)" in caplog.text


def test_an_error_in_training_keeps_the_weights_of_the_last_step(run, tmp_path, monkeypatch, caplog):
    compute_loss, calls = DistillationTrainer.compute_loss, []

    def fail_in_the_second_step(self, model, *arguments, **options):
        calls.append(model.training)
        if calls.count(True) == 2:
            raise ValueError("NaN in the batch")
        return compute_loss(self, model, *arguments, **options)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", fail_in_the_second_step)
    status, printed = run()
    assert status == 2 and "NaN in the batch" in printed
    assert "stopped after 1 of 2 steps" in caplog.text and str(tmp_path / "out" / "ro") in caplog.text
    assert (tmp_path / "out" / "ro" / "adapter_model.safetensors").is_file()


def test_an_error_in_the_first_step_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(DistillationTrainer, "compute_loss", unable)
    with pytest.raises(RuntimeError, match="unable"):
        run()
    assert not list((tmp_path / "out").rglob("*adapter*")) and not (tmp_path / "out" / "results.json").exists()


def test_an_adapter_has_its_results_and_our_card(run, tmp_path):
    assert run()[0] == 0
    rates = results_of(tmp_path / "out")["languages"]["ro"]["expert"]
    (language,) = read_languages(tmp_path / "out")
    assert language.wer == rates["wer"] and set(language.results) == {"recordings"}  # the folder's name, no path
    for card in (tmp_path / "out" / "README.md", tmp_path / "out" / "ro" / "README.md"):
        assert "Romanian (ro)" in card.read_text() and str(tmp_path) not in card.read_text()


def test_the_teacher_is_measured_at_its_own_context(run, longer_student, tmp_path):
    status, printed = run("--teacher", longer_student, "--max_audio_seconds", 1, "--max_new_tokens", 8)
    assert status == 0, printed
    row = results_of(tmp_path / "out")["languages"]["ro"]
    assert row["teacher"] == row["base_full_context"]  # the same model
    assert "| teacher, 30 s context " in printed


# ------------------------------------------------------------------------------------------------------------ compare


def test_runs_of_several_folders_are_compared(run, tmp_path, capsys):
    assert run("--output_dir", tmp_path / "expert", languages=("ro", "ca"))[0] == 0
    assert run("--output_dir", tmp_path / "lora", method=LORA)[0] == 0
    assert main(["compare", str(tmp_path / "expert"), str(tmp_path / "lora")]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [[row[0], row[2], Path(row[-1]).name] for row in cells] == [
        ["ca", "base", ""],
        ["ca", "with expert", "expert"],
        ["ca", "base, joined to about a minute", ""],
        ["ca", "with expert, joined to about a minute", "expert"],
        ["ro", "base", ""],
        ["ro", "with expert", "expert"],
        ["ro", "base, joined to about a minute", ""],
        ["ro", "with expert, joined to about a minute", "expert"],
        ["ro", "with LoRA", "lora"],
        ["ro", "with LoRA, joined to about a minute", "lora"],
    ]


def test_a_run_without_a_finished_language_is_named(run, killed, tmp_path, capsys):
    killed()
    assert run("--output_dir", tmp_path / "whole")[0] == 0
    said = f"{tmp_path / 'out'}: the training of ro is not finished"
    assert main(["compare", str(tmp_path / "out"), str(tmp_path / "whole")]) == 0
    printed = capsys.readouterr()
    assert said in printed.err and "| with expert " in printed.out
    with pytest.raises(SystemExit) as exit:
        main(["compare", str(tmp_path / "out")])
    assert exit.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "{}", "no JSON"])
def test_a_folder_that_is_no_run_is_not_compared(tmp_path, capsys, text):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(SystemExit) as exit:
        main(["compare", str(tmp_path)])
    assert exit.value.code == 2 and str(tmp_path) in capsys.readouterr().err


def test_unusable_recordings_of_all_languages_are_known_before_any_training(run, recordings, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_clsr.cli.train_language.train_language", lambda *args: pytest.fail("training began"))
    (recordings / "train" / "4.wav").write_text("no audio")  # the only Catalan one to train on
    status, printed = run(languages=("ro", "ca"))
    assert status == 2 and not (tmp_path / "out").exists()
    assert "ro, training: 4 of 4 recordings can be used (none dropped)" in printed
    assert "ro, evaluation: 2 of 2" in printed and "ca, training: 0 of 1" in printed
    assert (
        f"no item of the 1 in the dataset can be used (1 unreadable): item 0: audio {recordings}/train/4.wav"
        in printed
    )


def test_the_limit_of_labels_is_that_of_the_student(run, student, tiny_whisper, tmp_path):
    tiny_whisper(max_target_positions=10).save_pretrained(student)  # "null 0" has 11 labels
    status, printed = run()
    assert status == 2 and not (tmp_path / "out").exists()
    assert "4 labels_too_long" in printed and "labels of 11 tokens, longer than 10" in printed


# ------------------------------------------------------------------------------------------------------- warm start


@pytest.fixture
def experts(student, tmp_path):
    """A folder of random experts of French and Greek, as `run` makes them."""
    base = WhisperForConditionalGeneration.from_pretrained(student, dtype=torch.float32)
    model = random_clsr(base, "fr", "el", expert_rank=32)
    for language in ("fr", "el"):
        save_language(model, tmp_path / "experts", language)
    return tmp_path / "experts"


def test_an_expert_starts_as_a_copy_and_its_card_and_checkpoints_say_so(run, experts, tmp_path):
    options = ("--warm_start", f"{experts}:french", "--learning_rate", 1e-9)
    status, printed = run(*options, "--save_steps", 1, "--keep_checkpoints")
    assert status == 0, printed
    out = tmp_path / "out"
    source = load_file(experts / "fr/adapter_model.safetensors")
    trained = load_file(out / "ro/adapter_model.safetensors")
    assert source.keys() == trained.keys()
    assert all(torch.allclose(source[name], trained[name], atol=1e-6) for name in source)
    for folder in (out / "ro", out / "checkpoints/ro/checkpoint-1/ro"):
        assert json.loads((folder / "adapter_config.json").read_text())["started_from"] == "fr of the folder experts"
    assert json.loads((out / "ro/language.json").read_text())["started_from"] == "fr of the folder experts"
    assert "Romanian (ro): started from fr of the folder experts" in (out / "README.md").read_text()
    # A run from another source is another run.
    status, printed = run("--warm_start", f"{experts}:el", "--learning_rate", 1e-9)
    assert status == 2 and "warm_start" in printed and "--overwrite" in printed
    shutil.rmtree(experts)  # what is done already needs no source
    status, printed = run(*options, "--save_steps", 1)
    assert status == 0 and "trained before" in printed


def test_a_warm_start_from_the_hub(run, experts, hub, tmp_path):
    push_folder(experts, "me/experts")
    status, printed = run("--warm_start", "me/experts:fr")
    assert status == 0, printed
    assert read_languages(tmp_path / "out")[0].started_from.startswith("fr of me/experts (commit ")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("{experts}:pt", (), r"has nothing for 'pt'; it has el \(Greek\), fr \(French\)"),
        ("{experts}", (), r"has el \(Greek\), fr \(French\): name the language to start from"),
        ("{experts}/fr", ("--expert_rank", 2), "expert_rank is 2 in adapter 'ro' and 32 in fr of .* expert_rank=32"),
        ("{experts}/fr", ("--exclude_modules", ".*encoder.*"), "exclude_modules is '.*encoder.*' here and None there"),
        ("{experts}/fr", ("--lora_rank", 2), "--lora_rank trains LoRA instead of an expert, so --warm_start would do"),
        ("{experts}x:fr", (), "--warm_start '.*expertsx' does not exist"),
        ("C:\\experts\\fr", (), r"--warm_start 'C:\\+experts\\+fr' does not exist"),
        ("{experts}:", (), r"is not FOLDER_OR_REPO\[:language\]"),
    ],
)
def test_a_warm_start_that_cannot_be_is_refused_before_the_work(run, experts, tmp_path, source, options, message):
    method = () if "--lora_rank" in options else ("--gate_dim", 8)
    status, printed = run("--warm_start", source.format(experts=experts), *options, method=method)
    assert status == 2 and re.search(message, printed), printed
    assert "base model: " not in printed and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- what chooses, what is measured


def write_table(folder, split, rows, columns="file_name,transcription"):
    """A table of noise; `rows` have the cells after the file name."""
    (folder / split).mkdir(parents=True)
    lines = [columns]
    for i, row in enumerate(rows):
        soundfile.write(folder / split / f"{i}.wav", noise(0.5, seed=i), 16000)
        lines.append(f"{i}.wav,{row}")
    (folder / split / "metadata.csv").write_text("\n".join(lines) + "\n")


SELECTION = ("--validation_split", "validation", "--max_new_tokens", 8, "--keep_checkpoints")


def spy_on_best(monkeypatch, better):
    """Let checkpoint `better` (1 or 2) have the lower error rate. Returns the sizes of the evaluated sets."""
    sizes = []

    def metrics(self, prediction):
        sizes.append(len(prediction.label_ids))
        return {"error_rate": 0.25 if len(sizes) == better else 0.5}

    monkeypatch.setattr("peft_clsr.evaluation.metrics.ErrorRateMetrics.__call__", metrics)
    return sizes


@pytest.mark.parametrize("method", [("--gate_dim", 8), LORA], ids=["expert", "lora"])
@pytest.mark.parametrize("better", [1, 2])
def test_the_best_checkpoint_by_the_validation_split_is_kept(run, recordings, tmp_path, monkeypatch, method, better):
    write_table(recordings, "validation", ["trei", "patru", "cinci"])
    sizes = spy_on_best(monkeypatch, better)
    options = ("--eval_strategy", "steps", "--eval_steps", 1, "--save_total_limit", 2, "--learning_rate", 0.1)
    status, printed = run(*SELECTION, *options, method=method)
    assert status == 0, printed
    assert sizes == [3, 3]  # the validation split, not the two recordings of test
    assert f"the best of 2 checkpoints is that of step {better} of 2, with error_rate 25.0%" in printed
    row = results_of(tmp_path / "out")["languages"]["ro"]
    assert row["best"] == {"step": better, "error_rate": 0.25} and row["base"]["utterances"] == 2
    checkpoints = tmp_path / "out" / "checkpoints" / "ro"
    kept = load_file(tmp_path / "out" / "ro" / "adapter_model.safetensors")
    of_steps = [load_adapter_of(checkpoints / f"checkpoint-{step}") for step in (1, 2)]
    assert any(not torch.equal(of_steps[0][name], of_steps[1][name]) for name in kept)
    assert all(torch.equal(of_steps[better - 1][name], kept[name]) for name in kept)


def load_adapter_of(checkpoint):
    (file,) = checkpoint.rglob("adapter_model.safetensors")
    return load_file(file)


def test_without_a_validation_split_a_part_of_the_training_recordings_chooses(run, tmp_path):
    status, printed = run(*SELECTION, "--metric_for_best_model", "loss")
    assert status == 0, printed
    assert "has neither validation/metadata.csv" in printed and "but has test, train" in printed
    assert "1 of 4 training recordings are held out for validation, by text, each sentence in one part" in printed
    row = results_of(tmp_path / "out")["languages"]["ro"]
    assert (row["train_items"]["kept"], row["validation_items"]["kept"], row["eval_items"]["kept"]) == (3, 1, 2)
    assert row["best"].keys() == {"step", "loss"} and row["best"]["step"] == row["train_steps"] == 2


def test_few_validation_words_are_named(run):
    status, printed = run(*SELECTION)
    assert status == 0, printed
    assert "ro: the validation recordings have 2 words, so differences of a few points" in printed


def test_a_dataset_with_a_column_of_text_is_held_out_and_checked(run, recordings, tmp_path):
    folder = tmp_path / "parquet"
    folder.mkdir()

    def write(split, texts):
        audio = [{"bytes": (recordings / "train" / f"{i}.wav").read_bytes(), "path": None} for i in range(len(texts))]
        table = datasets.Dataset.from_dict({"audio": audio, "text": texts})
        table.cast_column("audio", datasets.Audio(decode=False)).to_parquet(folder / f"{split}-0.parquet")

    write("train", [f"null {i}" for i in range(4)])
    write("test", ["...", "..."])
    status, printed = run(*SELECTION, dataset=folder)
    assert status == 2 and "none of the 2 references in 'ro' can be scored" in printed, printed
    assert "base model: " not in printed and not (tmp_path / "out").exists()
    write("test", ["unu", "doi"])
    status, printed = run(*SELECTION, dataset=folder)
    assert status == 0 and "1 of 4 training recordings are held out for validation, by text" in printed, printed
    assert "ro: the validation recordings have 2 words" in printed


def test_long_recordings_are_held_out_whole(tiny_processor):
    rows = [{"audio": f"{i // 3}.wav", "start": str(i % 3), "transcription": f"text {i}"} for i in range(12)]
    missing = MissingSplitError("no dev")
    data = DataArguments("s", "d", ["ro"], validation_split="dev")
    for count, size, how in ((12, 3, "recording"), (3, 1, "time, the end of each recording for dev")):
        recordings = datasets.Dataset.from_list(rows[:count])
        train, validation, note = held_out(recordings, data, missing)
        assert len(validation) == size and f"({missing}), so {size} of {count}" in note and note.endswith(how)
        if count == 12:
            assert not set(train["audio"]) & set(validation["audio"])
        assert sorted([*train["transcription"], *validation["transcription"]]) == sorted(recordings["transcription"])
    with pytest.raises(ValueError, match="no dev; and of the training recordings none can be held out: 1 different"):
        held_out(datasets.Dataset.from_list([{"audio": "0.wav", "transcription": "da"}]), data, missing)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--eval_strategy", "epoch"), "--eval_strategy epoch evaluates in training"),
        (("--validation_split", "test"), "--validation_split and --eval_split are both 'test'"),
        (("--train_split", "test"), "--train_split and --eval_split are both 'test': the expert would be measured"),
        (("--eval_split", "train"), "--train_split and --eval_split are both 'train'"),
        (("--eval_split", "train", "--eval_dataset", "{recordings}"), "are both 'train'"),
        (("--validation_split", "train"), "--train_split and --validation_split are both 'train'"),
        (("--validation_split", "train", "--eval_config", "a"), "--train_split and --validation_split are both"),
        (("--most_upvoted", 0), "--most_upvoted is 0, expected at least 1"),
        (("--most_upvoted", 5, "--max_train_samples", 5), "leave out one of the two"),
        (("--most_upvoted", 5), "no column 'up_votes', which Common Voice's tables have, but"),
        (("--eval_text_column", "sentence"), "has no column 'sentence', but"),
        (("--eval_config", "a", "b"), "2 values of --eval_config for 1 languages"),
    ],
)
def test_wrong_choices_of_recordings_are_named_before_the_work(run, recordings, tmp_path, options, named):
    status, printed = run(*(str(option).replace("{recordings}", str(recordings)) for option in options))
    assert status == 2 and named in printed, printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", [{"eval_dataset": "other"}, {"eval_config": ["other"]}])
def test_splits_of_one_name_in_other_recordings_are_taken(tmp_path, other):
    training = DistillationTrainingArguments(str(tmp_path), use_cpu=True)
    for splits in ({"eval_split": "train"}, {"validation_split": "test"}):
        data = DataArguments("base", "data", ["ro"], dataset_config=["one"], **splits, **other)
        check_options(data, ExpertArguments(), LoraArguments(), training)


def test_recordings_with_most_up_votes_are_trained_on(run, recordings, tmp_path):
    shutil.rmtree(recordings / "train")
    votes = [(2, 0), (9, 1), (10, 0), (2, 0), (9, 0)]  # as text, 9 would be above 10
    rows = [f"propoziția {i},{up},{down}" for i, (up, down) in enumerate(votes)]
    write_table(recordings, "train", rows, "file_name,transcription,up_votes,down_votes")
    status, printed = run("--most_upvoted", 4)
    assert status == 0 and "ro: 4 of 5 recordings taken, those with most up-votes" in printed, printed
    assert results_of(tmp_path / "out")["languages"]["ro"]["train_items"]["kept"] == 4
    table = load_recordings(recordings, "ro", "train")
    for number, texts in ((1, [2]), (2, [2, 4]), (4, [0, 1, 2, 4]), (9, [0, 1, 2, 3, 4])):
        taken = most_upvoted(table, number, "table")["transcription"]
        assert taken[:] == [f"propoziția {i}" for i in texts]
    with pytest.raises(ValueError, match="table, row 0: up_votes is '', expected a whole number"):
        most_upvoted(datasets.Dataset.from_list([{"up_votes": ""}]), 1, "table")


def test_training_on_one_dataset_and_testing_on_another_with_other_columns(run, recordings, tmp_path):
    """As Common Voice (tables) and FLEURS (Parquet, a folder for each configuration)."""
    shutil.rmtree(recordings / "test")
    for path in (recordings / "train").glob("*.csv"):
        path.write_text(path.read_text().replace("transcription", "sentence"))
    rows = []
    for i in range(3):
        soundfile.write(tmp_path / "one.wav", noise(0.5, seed=i), 16000)
        sound = {"bytes": (tmp_path / "one.wav").read_bytes(), "path": f"{i}.wav"}
        rows.append({"sound": sound, "transcription": f"fraza {i}", "sentence": "not this", "language": "Romanian"})
    fleurs = datasets.Dataset.from_list(rows).cast_column("sound", datasets.Audio(16000, decode=False))
    (tmp_path / "fleurs" / "ro_ro" / "test").mkdir(parents=True)
    fleurs.to_parquet(tmp_path / "fleurs" / "ro_ro" / "test" / "0000.parquet")
    options = ("--eval_dataset", tmp_path / "fleurs", "--eval_config", "ro_ro", "--eval_text_column", "transcription")
    options += ("--eval_audio_column", "sound", "--text_column", "sentence")
    status, printed = run(*options)
    assert status == 0, printed
    row = results_of(tmp_path / "out")["languages"]["ro"]
    assert (row["dataset_config"], row["eval_config"]) == (None, "ro_ro")
    assert row["train_items"]["kept"] == 4 and row["expert"]["utterances"] == 3
    (language,) = read_languages(tmp_path / "out")
    assert language.results.keys() == {"fleurs"} and language.results["fleurs"]["config"] == "ro_ro"
    status, printed = run(*options[:2], "--eval_config", "ro", *options[4:])
    assert status == 2 and "holds a training of ro on None and 'ro_ro', not None and 'ro'" in printed


def test_the_teacher_is_the_top_line_of_the_table(run, student):
    status, printed = run("--teacher", student, "--max_new_tokens", 8)
    assert status == 0, printed
    models = [line.split("|")[3].strip() for line in printed.splitlines() if line.startswith("| ro ")]
    assert models[:3] == ["teacher", "base", "with expert"]
