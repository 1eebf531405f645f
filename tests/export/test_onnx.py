"""Exported graphs: PyTorch's tokens, the names that other software reads, and transcription without PyTorch."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers", minversion="5.23")
soundfile = pytest.importorskip("soundfile")
from helpers import noise
from transformers.models.whisper.generation_whisper import WhisperTimeStampLogitsProcessor

from benchmarks.ort_whisper import ort_whisper
from peft_clsr import export_model
from peft_clsr.cli import main
from peft_clsr.export import onnx_graphs
from peft_clsr.inference.exported import ExportedExpert
from peft_clsr.inference.onnx_whisper import OnnxWhisper
from peft_clsr.inference.subtitles import Transcript
from peft_clsr.inference.token_rules import TokenRules


@pytest.fixture
def exported(export_once, bilingual, processor):
    """`exported("full")` is the folder of the Catalan expert of `bilingual("full")`."""

    def get(kind="low-rank"):
        return export_once(
            f"onnx/{kind}", lambda folder: export_model(bilingual(kind), "ca", folder, processor=processor)
        )

    return get


def features_of(processor, seconds, batch=1):
    waveforms = [noise(seconds, seed=seed) for seed in range(batch)]
    return processor.feature_extractor(
        waveforms,
        sampling_rate=16000,
        return_tensors="pt",
        truncation=False,
        padding="longest",
        return_attention_mask=True,
    )


@pytest.mark.parametrize("kind", ["low-rank", "full"])
@pytest.mark.parametrize(("batch", "prompt"), [(1, 1), (3, 4)])
def test_logits_are_those_of_pytorch_with_the_expert_active(exported, bilingual, processor, kind, batch, prompt):
    model, graphs = bilingual(kind), ort_whisper(ExportedExpert.open(exported(kind)))
    model.set_adapter("ca")
    features = torch.randn(batch, 80, 100, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(97, 122, (batch, prompt + 3), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(input_features=features, decoder_input_ids=tokens).logits
        model.set_adapter("ro")
        others = model(input_features=features, decoder_input_ids=tokens).logits
    assert (expected - others).abs().max() > 0.1
    states = graphs.model.encoder.forward(features)
    output = graphs(decoder_input_ids=tokens[:, :prompt], encoder_outputs=states)
    logits = [output.logits]
    for place in range(prompt, prompt + 3):
        output = graphs(
            decoder_input_ids=tokens[:, place : place + 1],
            encoder_outputs=states,
            past_key_values=output.past_key_values,
        )
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seconds", [0.7, 3.5])
def test_greedy_tokens_are_those_of_pytorch_also_of_long_recordings(exported, bilingual, processor, seconds):
    model, graphs = bilingual(), ort_whisper(ExportedExpert.open(exported()))
    inputs = features_of(processor, seconds, batch=2)
    settings = {"task": "transcribe", "language": "ca", "return_timestamps": True, "max_new_tokens": 10}
    expected = model.generate(**inputs, **settings)
    assert expected.shape[1] > 3
    assert torch.equal(graphs.generate(**inputs, **settings), expected)


def test_names_and_shapes_are_those_that_other_software_reads(exported):
    folder = exported()
    sessions = [onnx.load(folder / f"onnx/{name}.onnx").graph for name in ("encoder_model", "decoder_model_merged")]
    for name in ("encoder_model", "decoder_model_merged"):
        onnx.checker.check_model(folder / f"onnx/{name}.onnx", full_check=True)
    assert [[value.name for value in graph.input] for graph in sessions] == [
        ["input_features"],
        [
            "input_ids",
            "encoder_hidden_states",
            *[
                f"past_key_values.{layer}.{side}.{kind}"
                for side in ("decoder", "encoder")
                for layer in (0, 1)
                for kind in ("key", "value")
            ],
            "use_cache_branch",
        ],
    ]
    assert [value.name for value in sessions[0].output] == ["last_hidden_state"]
    assert {value.name for value in sessions[1].output} == {
        "logits",
        *(value.name.replace("past_key_values", "present") for value in sessions[1].input if "past" in value.name),
    }
    for name in ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "vocab.json"):
        assert (folder / name).is_file()
    about = json.loads((folder / "expert.json").read_text())
    assert (about["language"], about["prompt_language"]) == ("ca", "ca")
    assert json.loads((folder / "generation_config.json").read_text())["language"] == "ca"


def test_precisions_stand_in_one_folder_and_the_model_is_not_changed(
    exported, bilingual, processor, tmp_path, monkeypatch
):
    model, folder = bilingual("full"), tmp_path / "ca"
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.set_adapter("ro")
    shutil.copytree(exported("full"), folder)
    monkeypatch.setattr(onnx_graphs, "_MOST_IN_ONE_FILE", 1000)  # weights of float16 stand in a second file
    for precision in ("int8", "float16"):
        export_model(model, "ca", folder, processor=processor, precision=precision)
    assert model.active_adapter == "ro" and set(model.peft_config) == {"ca", "ro"}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert {path.name for path in (folder / "onnx").iterdir()} == {
        f"{name}{end}"
        for name in ("encoder_model", "decoder_model_merged")
        for end in (".onnx", "_fp16.onnx", "_fp16.onnx_data", "_quantized.onnx")
    }
    features = torch.randn(1, 80, 100, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([[100, 101, 102]])
    with torch.no_grad():
        model.set_adapter("ca")
        expected = model(input_features=features, decoder_input_ids=tokens).logits
    for precision, tolerance in (("float16", 0.05), ("int8", 0.5)):
        graphs = ort_whisper(ExportedExpert.open(folder), precision)
        states = graphs.model.encoder.forward(features)
        logits = graphs(decoder_input_ids=tokens, encoder_outputs=states).logits.float()
        difference = (logits - expected).abs().max()
        assert 0 < difference < tolerance


def test_what_cannot_be_exported_is_refused(exported, bilingual, processor, tmp_path):
    model = bilingual()
    for wrong, message in (
        ({"format": "lora"}, "expected 'onnx' or 'openvino'"),
        ({"precision": "int4"}, "expected one of float32, float16, int8"),
        ({"language": "fr"}, "fr"),
    ):
        settings = {"language": "ca"} | wrong
        with pytest.raises(ValueError, match=message):
            export_model(model, settings.pop("language"), tmp_path / "ca", processor=processor, **settings)
    assert not (tmp_path / "ca").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        export_model(model, "ca", tmp_path / "full", processor=processor)
    with pytest.raises(ValueError, match="nor an export of this expert"):
        export_model(model, "ro", exported(), processor=processor)
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "expert" in name and ".ca." in name).add_(1)
    with pytest.raises(ValueError, match="nor an export of this expert"):  # the same language, another training
        export_model(model, "ca", exported(), processor=processor, precision="int8")


def test_rules_of_the_next_token_are_those_of_transformers():
    generator = np.random.default_rng(0)
    size, end, no_timestamps = 60, 30, 39
    rules = TokenRules(end, no_timestamps, suppressed=(), blank=(), timestamps=True, max_first=5)
    first = no_timestamps + 1

    class Config:
        no_timestamps_token_id, eos_token_id, bos_token_id = no_timestamps, end, end
        max_initial_timestamp_index = 5
        _detect_timestamp_from_logprob = True

    processor = WhisperTimeStampLogitsProcessor(Config(), begin_index=3)
    prompt, seen = [31, 32, 33], 0
    for _ in range(400):
        tokens, time = [], first + int(generator.integers(0, 6))
        for _ in range(int(generator.integers(0, 3))):  # whole segments, then a beginning of one
            tokens += [time, *generator.integers(0, end, generator.integers(1, 3)).tolist()]
            time = min(time + int(generator.integers(0, 4)), size - 1)
            tokens += [time]
        tokens += [[], [time], [time, 7]][generator.integers(0, 3)]
        logits = generator.normal(0, 2, size).astype(np.float32)
        expected = processor(torch.tensor([prompt + tokens]), torch.from_numpy(logits[None].copy()))[0].numpy()
        rules.apply(logits, tokens)
        np.testing.assert_array_equal(np.isinf(logits), np.isinf(expected))
        seen += bool(np.isinf(logits[:end]).all())
    assert 50 < seen < 350  # both kinds of steps occur


def test_a_folder_that_is_no_export_or_lacks_a_precision_is_refused(exported, tmp_path):
    with pytest.raises(ValueError, match="not the folder of an exported expert"):
        ExportedExpert.open(tmp_path)
    with pytest.raises(ValueError, match=r"no graphs in int8, it has float32: export it again with --precision int8"):
        OnnxWhisper(ExportedExpert.open(exported()), "int8")


@pytest.mark.parametrize("setting", [{"beam_size": 2}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 3}])
def test_settings_that_greedy_decoding_does_not_have_are_refused(exported, setting):
    whisper = OnnxWhisper(ExportedExpert.open(exported()))
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is .*: exported graphs are decoded greedily"):
        whisper.transcribe(noise(0.5), **setting)


@pytest.fixture
def files(tmp_path):
    for name, seconds in (("long", 2.6), ("short", 0.8)):
        soundfile.write(tmp_path / f"{name}.wav", noise(seconds, seed=len(name)), 16000)
    (tmp_path / "broken.wav").write_text("no audio")
    return tmp_path


def test_the_command_transcribes_without_pytorch(exported, files):
    program = (
        "import sys; sys.argv[0] = 'peft-clsr'; from peft_clsr.cli import main; status = main(sys.argv[1:]); "
        "sys.exit(status if 'torch' not in sys.modules else 99)"
    )
    command = ["transcribe", files, "--runtime", "onnx", "--model", exported(), "--output_format", "json"]
    command += ["--output_dir", files / "out"]
    done = subprocess.run([sys.executable, "-c", program, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr  # one cannot be read
    assert "broken.wav" in done.stderr and "2 transcribed, 1 skipped" in done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in (files / "out").iterdir()}
    assert {name: (content["seconds"], content["adapter"]) for name, content in found.items()} == {
        "long": (2.6, "ca"),
        "short": (0.8, "ca"),
    }


@pytest.fixture
def command(exported, files):
    """`peft-clsr transcribe --runtime onnx --num_processes` of `files`, where torch cannot be imported."""
    (files / "torch.py").write_text("raise ImportError('torch is loaded')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(files), *filter(None, sys.path)])}

    def start(count, *options):
        command = [sys.executable, "-m", "peft_clsr", "transcribe", files, "--runtime", "onnx", "--model", exported()]
        command += ["--output_format", "json", "--output_dir", files / f"out{count}", "--num_processes", count]
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        # Where the tests run in the background of a shell, Ctrl-C is ignored, also by what they start.
        settings["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen([*map(str, [*command, *options])], env=environment, **settings)

    return start


def test_several_processes_write_what_one_writes(command, files):
    refused = command(2, "--language", "ro")
    assert "are for 'ca' alone, and recordings are in ro" in refused.communicate()[1] and refused.returncode == 2
    for count in (1, 2):
        process = command(count)
        errors = process.communicate()[1]
        assert process.returncode == 1 and "2 transcribed, 1 skipped" in errors, errors
    one, two = ({path.name: path.read_text() for path in (files / f"out{count}").iterdir()} for count in (1, 2))
    assert one == two and len(one) == 2


def test_an_interruption_ends_all_processes_and_keeps_what_was_heard(command, files):
    psutil = pytest.importorskip("psutil")
    for name in ("long", "short"):
        soundfile.write(files / f"{name}.wav", noise(600), 16000)
    parts = [files / "out2" / f"{name}.json.part" for name in ("long", "short")]
    process = command(2)
    try:
        deadline = time.monotonic() + 120  # on a busy machine
        while not all(part.exists() for part in parts):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal
        errors = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130 and len(children) >= 2 and not psutil.wait_procs(children, timeout=10)[1]
    assert sorted((files / "out2").iterdir()) == parts and all(json.loads(part.read_text()) for part in parts)
    assert errors.count(": interrupted; what was heard up to ") == 2
    assert len(re.findall("^interrupted$", errors, flags=re.MULTILINE)) == 1 and "leaked" not in errors


@pytest.mark.parametrize("vad", [False, True])
def test_a_part_with_sound_and_without_text_is_told(exported, tmp_path, capsys, monkeypatch, vad):
    path = tmp_path / "half.wav"
    soundfile.write(path, noise(12), 16000)
    half = Transcript("ca", "ca", 12.0, [{"start": 0.0, "end": 4.0, "text": " da"}])
    monkeypatch.setattr(OnnxWhisper, "transcribe", lambda *args, **kwargs: half)
    options = ["--runtime", "onnx", "--model", str(exported()), *["--vad"] * vad]
    assert main(["transcribe", str(path), *options]) == 0
    told = capsys.readouterr().err
    assert told.count(f"warning: {path} has no text from 4 to 12 s, although there is sound") == (not vad)


def test_options_of_the_other_runtime_and_other_languages_are_refused(exported, files, capsys):
    base = ["transcribe", str(files), "--runtime", "onnx", "--model", str(exported())]
    for options, message in (
        (["--adapters", "x"], "the expert is in the graphs"),
        (["--num_beams", "3"], "decoding is greedy"),
        (["--language", "ro"], "are for 'ca' alone, and recordings are in ro"),
        (["--precision", "int8"], "no graphs in int8"),
    ):
        with pytest.raises(SystemExit) as error:
            main([*base, *options])
        assert error.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["transcribe", str(files), "--model", str(exported()), "--precision", "int8"])
    assert "--precision is for --runtime onnx" in capsys.readouterr().err


def test_the_command_exports_and_shows_error_rates(export):
    status, printed = export(["expert", "mixed", "shared", "mixed"], "--format", "onnx")
    assert status == 0, printed
    assert [row.split("|")[1].strip() for row in printed.splitlines() if row.startswith("| ")] == [
        "model",
        "------------------------",
        "with the expert, PyTorch",
        "ONNX Runtime, float32",
    ]
    # How many is not sure: a random model is unsure of each token, and faster-whisper's features differ a little.
    assert "of 3 transcripts of ONNX Runtime, float32 equal those of PyTorch" in printed
