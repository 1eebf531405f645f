"""`peft-clsr transcribe` from end to end on a tiny random Whisper and noise, and its bad input."""

import html
import json
import os
import sys
import unicodedata
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pysubs2
import pytest
import soundfile
import torch
from conftest import SPECIAL_TOKENS, build_tokenizer
from helpers import QUIET, randomize, syllables, write_container
from peft import LoraConfig, get_peft_model
from transformers import (
    GenerationConfig,
    GenerationMixin,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)
from transformers.utils import logging

from peft_clsr import CLSRConfig, cut_at_pauses, push_language
from peft_clsr.cli import main, transcribe_processes
from peft_clsr.files import write_text
from peft_clsr.inference import transcribe
from peft_clsr.inference.subtitles import Transcript, format_transcript

TIMESTAMPS = [f"<|{position / 50:.2f}|>" for position in range(51)]
SECONDS = {"a.wav": 0.5, "deep/b.flac": 0.9, "deep/er/c.ogg": 2.3, "d.mp3": 3.0, "e.wav": 1.0}


@pytest.fixture
def base(tiny_whisper, tmp_path):
    """The folder of a Whisper of 1 s of context that knows timestamps, and a factory of the same model."""
    tokenizer = build_tokenizer([*SPECIAL_TOKENS, *TIMESTAMPS])

    def build():
        whisper = tiny_whisper(init_std=0.2, vocab_size=len(tokenizer))
        whisper.generation_config.max_length = 12  # noise makes a random model talk without end
        return whisper

    folder = tmp_path / "base"
    build().save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(chunk_length=1), tokenizer).save_pretrained(folder)
    return SimpleNamespace(folder=folder, build=build)


@pytest.fixture
def experts(base, tmp_path):
    """A factory of folders with one folder a language."""

    def save(*languages, folder="experts", **config):
        model = base.build()
        for seed, language in enumerate(languages):
            settings = CLSRConfig.paper(language=language, **{**QUIET, "gate_dim": 8, **config})
            if seed == 0:
                model = get_peft_model(model, settings, adapter_name=language)
            else:
                model.add_adapter(language, settings)
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "clsr_" in name:
                    parameter.add_(torch.randn_like(parameter))
        model.save_pretrained(tmp_path / folder)
        return tmp_path / folder

    return save


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "recordings"
    generator = np.random.default_rng(0)
    for name, seconds in SECONDS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, generator.normal(0, 0.1, round(seconds * 16000)).astype(np.float32), 16000)
    (folder / "notes.txt").write_text("no recording")
    (folder / "._a.wav").write_text("left by another system")
    return folder


@pytest.fixture
def run(base, recordings, tmp_path, monkeypatch, capsys):
    """Runs `peft-clsr transcribe` with the given further arguments; returns its exit status and what it printed."""

    def call(*arguments, inputs=(recordings,), output_dir=tmp_path / "out"):
        command = ["transcribe", *inputs, "--model", base.folder, "--device", "cpu", *arguments]
        command += [] if output_dir is None else ["--output_dir", output_dir]
        try:
            status = main([str(part) for part in command])
        except SystemExit as error:
            status = error.code
        return status, capsys.readouterr()

    verbosity = logging.get_verbosity()
    yield call
    logging.set_verbosity(verbosity)  # the command sets it for its process


@pytest.fixture
def generated(monkeypatch):
    """What the script asked of `generate` for each batch: `language`, `task`, `shape` and `dtype` of features."""
    calls = []
    generate = WhisperForConditionalGeneration.generate

    def spy(self, *args, **kwargs):
        features = kwargs["input_features"]
        asked = {"language": kwargs["language"], "task": kwargs["task"]}
        calls.append(SimpleNamespace(**asked, shape=tuple(features.shape), dtype=features.dtype))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(WhisperForConditionalGeneration, "generate", spy)
    return calls


def written(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def read_json(folder):
    return {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in written(folder)}


# ---------------------------------------------------------------- what is written


def test_recordings_of_several_languages_are_one_batch_each_by_its_expert(
    run, experts, recordings, generated, tmp_path
):
    table = recordings / "metadata.csv"
    rows = ["a.wav,ca", "deep/b.flac,Romanian", "deep/er/c.ogg,ca_es", "d.mp3,bg", "e.wav,"]
    table.write_text("\n".join(["file_name,language", *rows]) + "\n")
    status, printed = run(
        "--adapters", experts("ca", "ro"), "--language", "fr", "--output_format", "json", inputs=[table]
    )
    assert status == 0, printed.err
    assert "5 transcribed, 0 skipped" in printed.err
    assert [call.language for call in generated] == [["bg", "ca-ES", "fr", "ro", "ca"]]  # the longest first
    assert generated[0].shape == (5, 80, 300)
    transcripts = read_json(tmp_path / "out")
    heard = {name: (transcript["language"], transcript["adapter"]) for name, transcript in transcripts.items()}
    assert heard == {
        "a.json": ("ca", "ca"),
        "deep/b.json": ("ro", "ro"),
        "deep/er/c.json": ("ca-ES", "ca"),
        "d.json": ("bg", None),
        "e.json": ("fr", None),
    }
    for name, seconds in SECONDS.items():
        transcript = transcripts[str(Path(name).with_suffix(".json"))]
        assert transcript["file"] == str(recordings / name)
        assert transcript["seconds"] == pytest.approx(seconds, abs=0.1)  # MP3 has frames
        times = [segment[key] for segment in transcript["segments"] for key in ("start", "end")]
        assert times == sorted(times)
        assert all(0 <= time <= transcript["seconds"] for time in times)
        assert all(segment["start"] < segment["end"] for segment in transcript["segments"])
    assert sum(len(transcript["segments"]) for transcript in transcripts.values()) > len(SECONDS)


def test_an_expert_changes_the_text_of_its_language_alone(run, experts, recordings, tmp_path):
    table = recordings / "metadata.csv"
    table.write_text("file_name,language\nd.mp3,bg\ne.wav,ca\n")
    texts = []
    for adapters in ([], ["--adapters", experts("ca", "ro")]):
        arguments = ["--output_format", "json", "--batch_size", 1, "--overwrite", *adapters]
        status, printed = run(*arguments, inputs=[table])
        assert status == 0, printed.err
        texts.append({name: transcript["text"] for name, transcript in read_json(tmp_path / "out").items()})
    assert texts[0]["d.json"] == texts[1]["d.json"] != ""
    assert texts[0]["e.json"] != texts[1]["e.json"]


def test_all_formats_say_the_same(run, recordings, tmp_path):
    for output_format in ("json", "text", "srt", "vtt"):
        arguments = ("--language", "ro", "--output_format", output_format)
        status, printed = run(*arguments, output_dir=tmp_path / output_format)
        assert status == 0, printed.err
    transcripts = read_json(tmp_path / "json")
    assert set(transcripts) == {str(Path(name).with_suffix(".json")) for name in SECONDS}
    for name, transcript in transcripts.items():
        segments = transcript["segments"]
        stem = name.removesuffix(".json")
        text = (tmp_path / "text" / f"{stem}.txt").read_text(encoding="utf-8")
        assert text == "".join(segment["text"] + "\n" for segment in segments)
        for suffix in ("srt", "vtt"):
            subtitles = pysubs2.load(str(tmp_path / suffix / f"{stem}.{suffix}"))
            times = [(line.start, line.end) for line in subtitles]
            assert times == [(round(1000 * segment["start"]), round(1000 * segment["end"])) for segment in segments]
    assert (tmp_path / "vtt" / "d.vtt").read_text(encoding="utf-8").startswith("WEBVTT\n\n")


def test_without_an_output_dir_texts_are_printed(run, recordings):
    status, printed = run("--language", "ro", output_dir=None)
    assert status == 0
    lines = printed.out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        str(recordings / name) for name in sorted(SECONDS, key=SECONDS.get, reverse=True)
    ]


def test_half_precision_is_taken(run, experts, generated, tmp_path):
    status, printed = run("--adapters", experts("ca"), "--language", "ca", "--dtype", "bfloat16", "--num_beams", 2)
    assert status == 0, printed.err
    assert [call.dtype for call in generated] == [torch.bfloat16]
    assert len(written(tmp_path / "out")) == len(SECONDS)


def test_a_translation_is_asked_for(run, generated, tmp_path):
    arguments = ("--language", "ro", "--output_format", "json", "--batch_size", 5)
    assert run(*arguments)[0] == run(*arguments, "--task", "translate", output_dir=tmp_path / "english")[0] == 0
    assert [call.task for call in generated] == ["transcribe", "translate"]
    for folder, task in (("out", "transcribe"), ("english", "translate")):
        assert {transcript["task"] for transcript in read_json(tmp_path / folder).values()} == {task}


HEARD = [
    "a <b> & {c}",
    r"C:\new\house\N{i}",
    r"{\an8}<i>x</i> </font>",
    "a --> b",
    "&lt; &amp;",
    "1",
    "one\n\n\r\ntwo\r\nthree",
]


def read_back(content, times):
    """Texts of subtitles by the rules of SRT and WebVTT: an empty line ends a subtitle."""
    cues = [cue.split("\n", 2) for cue in content.removeprefix("WEBVTT\n\n").strip().split("\n\n")]
    assert [(number, time) for number, time, _ in cues] == [(str(i), time) for i, time in enumerate(times, 1)]
    return [text for _, _, text in cues]


@pytest.mark.parametrize("output_format", ["srt", "vtt"])
def test_subtitles_have_the_text_as_it_was_heard(output_format):
    segments = [{"start": i + 0.5, "end": i + 1.25, "text": f" {text}"} for i, text in enumerate(HEARD)]
    content = format_transcript(Transcript("ro", None, 9.0, segments), output_format, Path("a.wav"))
    times = [f"00:00:0{i}.500 --> 00:00:0{i + 1}.250" for i in range(len(HEARD))]
    if output_format == "srt":
        times = [time.replace(".", ",") for time in times]
    texts = read_back(content, times)
    if output_format == "vtt":
        assert content.startswith("WEBVTT\n\n1\n") and not any("<" in text or ">" in text for text in texts)
        texts = [html.unescape(text) for text in texts]  # as a player shows them
    assert texts == [*HEARD[:-1], "one\ntwo\nthree"]  # an empty line would end the subtitle


@pytest.mark.parametrize("output_format", ["srt", "vtt"])
def test_a_player_shows_backslashes_of_subtitles(output_format, tmp_path):
    """FFmpeg reads the file, in PyAV. From SRT, which has no escapes, players drop text that looks like a tag."""
    text = r"a\new & 1 < 2 --> e" + (" <i>" if output_format == "vtt" else "")
    av = pytest.importorskip("av")
    path = tmp_path / f"a.{output_format}"
    segments = [
        {"start": 3600.0, "end": 3661.2, "text": text},
        {"start": 3662.0, "end": 3663.0, "text": "f"},
    ]
    write_text(path, format_transcript(Transcript("ro", None, 9999.0, segments), output_format, Path("a.wav")))
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux() if packet.size]
        shown = [subtitle.dialogue.decode() for packet in packets for subtitle in packet.decode()]
    assert [(packet.pts, packet.duration) for packet in packets] == [(3600000, 61200), (3662000, 1000)]
    assert shown[1] == "f"
    assert shown[0].replace("\u2060", "") == text  # FFmpeg joins a backslash with what follows


def test_text_and_json_have_the_text_as_it_was_heard():
    segments = [{"start": float(i), "end": i + 1.0, "text": text} for i, text in enumerate(HEARD[:-1])]
    transcript = Transcript("ro", None, 9.0, segments)
    assert format_transcript(transcript, "text", Path("a.wav")).splitlines() == HEARD[:-1]
    content = json.loads(format_transcript(transcript, "json", Path("a.wav")))
    assert [segment["text"] for segment in content["segments"]] == HEARD[:-1]


# ---------------------------------------------------------------- times


@pytest.mark.parametrize(
    ("heard", "made"),
    [
        ([(0.0, 2.0, "a"), (2.0, 3.0, "b")], [(0.0, 2.0, "a"), (2.0, 3.0, "b")]),
        ([(0.0, 30.0, "a")], [(0.0, 3.0, "a")]),  # rounded up past the end
        ([(0.0, 2.6, "a"), (1.0, 3.0, "b")], [(0.0, 1.0, "a"), (1.0, 3.0, "b")]),  # past the next window
        ([(0.0, 1.0, "a"), (2.5, 2.8, "b"), (2.0, 3.0, "c")], [(0.0, 1.0, "a"), (2.0, 3.0, "bc")]),
        ([(0.0, 2.0, "a"), (3.0, 4.0, "b")], [(0.0, 2.0, "a")]),  # heard in the silence after the end
        ([(0.0, 1.0, " "), (1.0, 2.0, "b")], [(1.0, 2.0, "b")]),
        ([], []),
    ],
    ids=str,
)
def test_segments_are_in_order_and_within_the_recording(heard, made):
    tokenizer = SimpleNamespace(decode=lambda tokens, skip_special_tokens: tokens)
    segments = [{"start": torch.tensor(start), "end": torch.tensor(end), "tokens": text} for start, end, text in heard]
    assert [
        (segment["start"], segment["end"], segment["text"])
        for segment in transcribe.order_segments(transcribe.decode_segments(segments, tokenizer), seconds=3.0)
    ] == [(pytest.approx(start), pytest.approx(end), text) for start, end, text in made]


def test_features_hold_all_of_the_audio_and_silence_up_to_the_context():
    extractor = WhisperFeatureExtractor()
    generator = np.random.default_rng(0)
    waveforms = [generator.normal(0, 0.1, size).astype(np.float32) for size in (8000, 16000, 40000)]
    features, mask = transcribe.make_features(waveforms, extractor, context=1.0)
    assert features.shape == (3, 80, 250)
    assert mask.sum(-1).tolist() == [100, 100, 250]
    alone = WhisperFeatureExtractor(chunk_length=1)(waveforms[0], sampling_rate=16000, return_tensors="pt")
    torch.testing.assert_close(features[:1, :, :100], alone.input_features)


# ---------------------------------------------------------------- only speech (--vad)


@pytest.fixture
def talk(recordings):
    """Speech from 3 to 5 and 9 to 10 s, of 12."""
    pause = np.zeros(48000, dtype=np.float32)
    samples = np.concatenate([pause, syllables(2), pause, pause[:16000], syllables(1, seed=9), pause[:32000]])
    soundfile.write(recordings / "talk.wav", samples, 16000, subtype="FLOAT")
    return samples


def test_with_vad_only_speech_is_heard_and_times_are_those_of_the_recording(run, base, talk, generated, tmp_path):
    assert run("--language", "ro", "--output_format", "json", "--vad", "--batch_size", 2)[0] == 0
    parts = cut_at_pauses(talk, max_seconds=1.0)
    assert len(parts) > 3 and sum(call.shape[0] for call in generated) == len(parts)
    assert all(call.shape[0] <= 2 and call.shape[-1] <= 100 for call in generated)
    out = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "out").rglob("*.json")}
    assert [out[name]["segments"] for name in "abcde"] == [[]] * 5  # noise
    assert out["talk"]["seconds"] == 12 and out["a"]["language"] == "ro" and out["a"]["text"] == ""
    model, processor = base.build(), WhisperProcessor.from_pretrained(base.folder)
    expected = []
    for batch in (parts[first : first + 2] for first in range(0, len(parts), 2)):
        waveforms = [talk[round(16000 * start) : round(16000 * end)] for start, end in batch]
        heard = transcribe.transcribe_waveforms(model, processor, waveforms, ["ro"] * len(batch))
        for (start, _), transcript in zip(batch, heard, strict=True):
            expected += [
                (start + one["start"], start + one["end"], one["text"].strip()) for one in transcript.segments
            ]
    assert expected
    assert [(one["start"], one["end"], one["text"]) for one in out["talk"]["segments"]] == [
        (pytest.approx(start, abs=1e-3), pytest.approx(end, abs=1e-3), text) for start, end, text in expected
    ]


@pytest.mark.parametrize("vad", [False, True])
def test_a_part_with_sound_and_without_text_is_told(run, recordings, monkeypatch, vad):
    path = recordings / "half.wav"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 12 * 16000).astype(np.float32), 16000)
    half = Transcript("ro", None, 12.0, [{"start": 0.0, "end": 4.0, "text": " da"}])
    for name in ("transcribe_waveforms", "transcribe_speech"):
        monkeypatch.setattr(transcribe, name, lambda *args, **kwargs: [half])
    status, printed = run("--language", "ro", *["--vad"] * vad, inputs=[path])
    assert status == 0
    assert printed.err.count(f"warning: {path} has no text from 4 to 12 s, although there is sound") == (not vad)


def test_with_vad_the_language_is_detected_in_the_first_speech(run, base, talk, recordings, generated):
    assert run("--vad", inputs=[recordings / "talk.wav"])[0] == 0
    start, end = cut_at_pauses(talk, max_seconds=1.0)[0]
    waveform = talk[round(16000 * start) : round(16000 * end)]
    extractor = WhisperFeatureExtractor(chunk_length=1)
    features = extractor(waveform, sampling_rate=16000, return_tensors="pt").input_features
    whisper = base.build()
    token = whisper.detect_language(features, num_segment_frames=100).item()
    codes = {value: key[2:-2] for key, value in whisper.generation_config.lang_to_id.items()}
    assert {code for call in generated for code in call.language} == {codes[token]}


def test_with_vad_a_transcript_grows_part_by_part(run, talk, recordings, monkeypatch, tmp_path):
    lengths, write = [], write_text

    def spy(path, text):
        lengths.append(len(json.loads(text)["segments"]))
        write(path, text)

    monkeypatch.setattr("peft_clsr.files.write_text", spy)
    assert run("--language", "ro", "--vad", "--output_format", "json", inputs=[recordings / "talk.wav"])[0] == 0
    assert len(lengths) > 3 and lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_vad_without_silero_is_refused_before_the_model_is_loaded(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    status, printed = run("--language", "ro", "--vad")
    assert status == 2 and "silero_vad is not installed: pip install 'peft_clsr[vad]'" in printed.err
    assert "can be read" not in printed.err


# ---------------------------------------------------------------- languages


def test_a_language_is_detected_among_those_given(run, generated, base, recordings):
    languages = ["ca", "el", "fr"]
    assert run("--language", *languages)[0] == 0
    assert set(generated[0].language) <= set(languages)
    assert run(output_dir=None)[0] == 0  # among all
    whisper = base.build()
    known = whisper.generation_config.lang_to_id
    assert {f"<|{code}|>" for code in generated[1].language} <= set(known)
    whisper.generation_config.lang_to_id = {token: known[token] for token in ("<|ca|>", "<|el|>", "<|fr|>")}
    expected = []
    for name in sorted(SECONDS, key=SECONDS.get, reverse=True):
        samples = soundfile.read(recordings / name, dtype="float32")[0][:16000]
        inputs = WhisperFeatureExtractor(chunk_length=1)(samples, sampling_rate=16000, return_tensors="pt")
        token = whisper.detect_language(inputs.input_features, num_segment_frames=100).item()
        expected.append(next(key for key, value in known.items() if value == token)[2:-2])
    assert generated[0].language == expected


def test_languages_that_whisper_does_not_know_take_their_experts(run, experts, base, generated, recordings, tmp_path):
    folder = experts("hsb", prompt_language="fr")
    arguments = ("--adapters", folder, "--output_format", "json")
    assert run(*arguments, "--language", "Upper Sorbian")[0] == 0
    assert {(entry["language"], entry["adapter"]) for entry in read_json(tmp_path / "out").values()} == {
        ("hsb", "hsb")
    }
    assert set(generated[-1].language) == {"hsb"}
    # Among these, what is heard as French is Upper Sorbian.
    assert run(*arguments, "--language", "hsb", "el", "--overwrite")[0] == 0
    assert {entry["language"] for entry in read_json(tmp_path / "out").values()} <= {"hsb", "el"}
    status, printed = run("--language", "hsb", output_dir=None)
    assert status == 2 and "Whisper does not know the language 'hsb', and --adapters has no expert" in printed.err
    status, printed = run(*arguments, "--language", "qqqq", output_dir=None)
    assert status == 2 and "'qqqq' is neither a language tag" in printed.err


def test_a_dialect_takes_the_expert_of_its_language(run, experts, generated, tmp_path):
    arguments = ("--adapters", experts("ca", "fr"), "--output_format", "json", "--language", "ca-valencia")
    with pytest.warns(UserWarning, match="no adapter for 'ca-valencia', so 'ca' takes it"):
        assert run(*arguments)[0] == 0
    entries = read_json(tmp_path / "out").values()
    assert {(entry["language"], entry["adapter"]) for entry in entries} == {("ca-valencia", "ca")}


def test_only_adapters_of_the_languages_are_loaded(run, experts, monkeypatch, tmp_path):
    loaded = []
    transcribe_waveforms = transcribe.transcribe_waveforms

    def spy(model, *args, **kwargs):
        loaded.append(sorted(getattr(model, "peft_config", {})))
        return transcribe_waveforms(model, *args, **kwargs)

    monkeypatch.setattr(transcribe, "transcribe_waveforms", spy)
    folder = experts("ca", "ro", "fr")
    for language in (["ca"], ["ca", "ro", "el"], []):
        arguments = ["--adapters", folder, "--overwrite", *(["--language", *language] if language else [])]
        assert run(*arguments)[0] == 0
    assert run("--adapters", folder / "ca", folder / "fr", "--overwrite")[0] == 0
    assert loaded == [["ca"], ["ca", "ro"], ["ca", "fr", "ro"], ["ca", "fr"]]


def test_adapters_of_a_repository_are_used(run, hub, base, experts, recordings, tmp_path):  # noqa: F811
    model = get_peft_model(base.build(), CLSRConfig.paper(language="ca", **QUIET), adapter_name="ca")
    push_language(randomize(model), "me/experts", "ca")
    arguments = ("--language", "ca", "--output_format", "json")
    assert run(*arguments, "--adapters", "me/experts")[0] == 0
    assert {transcript["adapter"] for transcript in read_json(tmp_path / "out").values()} == {"ca"}
    status, printed = run("--adapters", "me/nothing", output_dir=tmp_path / "other")
    assert status == 2 and "me/nothing is neither a folder here nor a repository" in printed.err


def test_at_a_cut_context_longer_recordings_are_heard_in_windows(run, experts, generated, tmp_path):
    folder = experts("ca", "ro", max_audio_seconds=0.5)
    status, printed = run("--adapters", folder, "--language", "ca", "ro", "--output_format", "json", "--batch_size", 2)
    assert status == 0, printed.err
    assert [call.shape for call in generated] == [(2, 80, 300), (2, 80, 100), (1, 80, 50)]
    for transcript in read_json(tmp_path / "out").values():
        assert transcript["adapter"] == transcript["language"]
        times = [segment[key] for segment in transcript["segments"] for key in ("start", "end")]
        assert times == sorted(times) and all(time <= transcript["seconds"] for time in times)


@pytest.mark.parametrize("arguments", [(), ("--language", "ca", "fr")])
def test_at_a_cut_context_a_language_without_adapter_is_refused(run, experts, tmp_path, arguments):
    status, printed = run("--adapters", experts("ca", max_audio_seconds=0.5), *arguments)
    assert status == 2 and "cut the model's context to 0.5 s" in printed.err
    assert not written(tmp_path / "out")


def test_adapters_that_cannot_be_on_one_model_are_refused(run, experts):
    cut, full, again = experts("ca", folder="cut", max_audio_seconds=0.5), experts("ro"), experts("ro", folder="again")
    status, printed = run("--adapters", cut, full, "--language", "ca", "ro")
    assert status == 2 and "ca 0.5 s, ro all" in printed.err
    status, printed = run("--adapters", full, again)
    assert status == 2 and f"several adapters are for ro: {full / 'ro'}, {again / 'ro'}" in printed.err
    assert run("--adapters", cut, full, "--language", "ro")[0] == 0  # the other is not needed


# ---------------------------------------------------------------- files


def test_a_file_that_cannot_be_read_is_named_and_skipped(run, recordings, tmp_path):
    (recordings / "empty.wav").touch()
    (recordings / "text.flac").write_text("no audio")
    (recordings / "video.mp4").write_bytes(bytes(1000))
    soundfile.write(recordings / "silence.wav", np.zeros(0), 16000)
    whole = (recordings / "deep" / "b.flac").read_bytes()
    (recordings / "cut.flac").write_bytes(whole[: len(whole) // 2])
    (recordings / "broken.wav").symlink_to(recordings / "gone.wav")
    status, printed = run("--language", "ro", "--batch_size", 2)
    assert status == 1
    bad = ("empty.wav", "text.flac", "video.mp4", "silence.wav", "cut.flac", "broken.wav")
    for name in bad:
        assert f"skipped: audio {recordings / name} " in printed.err
    assert "5 transcribed, 6 skipped" in printed.err
    assert "6 of 11 recordings can be read" in printed.err  # the header of cut.flac is whole
    assert printed.err.index("recordings can be read") < printed.err.index("cut.flac")
    assert written(tmp_path / "out") == {str(Path(name).with_suffix(".txt")) for name in SECONDS}


def test_names_of_any_length_are_taken_and_one_that_its_transcript_cannot_have_is_skipped(run, recordings, tmp_path):
    names = ["я" * 125 + ".wav", "a" * 251 + ".wav", "deep/" + "b" * 251 + ".wav", "deep/" + "c" * 250 + ".opus"]
    for name, source in zip(names, ("e.wav", "a.wav", "e.wav", "deep/er/c.ogg"), strict=True):
        (recordings / name).write_bytes((recordings / source).read_bytes())
    status, printed = run("--language", "ro", output_dir=tmp_path / "texts")
    assert status == 0 and "9 transcribed, 0 skipped" in printed.err, printed.err
    for _ in range(2):  # also when it is started again
        status, printed = run("--language", "ro", "--output_format", "json")
        assert status == 1 and printed.err.count("skipped: ") == 2, printed.err
        for name in names[1:3]:
            transcript = tmp_path / "out" / Path(name).with_suffix(".json")
            assert f"skipped: {recordings / name}: its transcript would be {transcript}" in printed.err
        assert len(written(tmp_path / "out")) == 7


def test_an_interruption_names_a_file_that_is_there(run, recordings, monkeypatch, tmp_path):
    write, count = write_text, []

    def full(path, text):
        count.append(path)
        if len(count) == full.at:
            raise OSError("no space left")
        write(path, text)

    monkeypatch.setattr("peft_clsr.files.write_text", full)
    for full.at, told in ((1, False), (2, True)):
        count.clear()
        status, printed = run("--language", "ro", inputs=[recordings / "d.mp3"])
        assert status == 2 and "error: a transcript cannot be written: no space left" in printed.err
        assert (f"is in {tmp_path / 'out' / 'd.txt.part'}" in printed.err) == told
        assert (tmp_path / "out" / "d.txt.part").exists() == told


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named_and_skipped(run, recordings):
    (recordings / "a.wav").chmod(0)
    status, printed = run("--language", "ro")
    assert status == 1 and f"skipped: audio {recordings / 'a.wav'} " in printed.err


def test_a_truncated_file_that_can_be_read_is_named_and_transcribed(run, recordings, tmp_path):
    path = recordings / "d.mp3"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    status, printed = run("--language", "ro", inputs=[path])
    assert status == 0 and (tmp_path / "out" / "d.txt").exists()
    assert f"warning: {path} ends after 1.4 s of the 3.0 s that its header says" in printed.err


def test_recordings_from_phones_and_names_of_another_unicode_form_are_transcribed(run, recordings, tmp_path):
    samples = np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32)
    write_container(recordings / "talk.m4a", samples, 16000, "aac")
    write_container(recordings / "film.mp4", samples, 16000, "aac", video=True)
    soundfile.write(recordings / unicodedata.normalize("NFD", "grün.wav"), samples, 16000)
    inputs = [recordings / name for name in ("talk.m4a", "film.mp4", unicodedata.normalize("NFC", "grün.wav"))]
    status, printed = run("--language", "ro", inputs=inputs)
    assert status == 0 and "3 of 3 recordings can be read" in printed.err and len(written(tmp_path / "out")) == 3


def test_no_recording_can_be_read(run, recordings, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "peft_clsr.inference.experts.load_with_experts", lambda *args: pytest.fail("a model was loaded")
    )
    (recordings / "empty.wav").touch()
    assert run("--language", "ro", inputs=[recordings / "empty.wav"])[0] == 1
    assert not written(tmp_path / "out")


def test_a_file_of_unknown_name_is_tried(run, recordings, tmp_path):
    (recordings / "e.wav").rename(recordings / "talk.2")
    assert run("--language", "ro", inputs=[recordings / "talk.2", recordings / "a.wav"])[0] == 0
    assert written(tmp_path / "out") == {"talk.2.txt", "a.txt"}


def test_transcripts_that_are_there_are_kept(run, recordings, generated, tmp_path):
    kept = tmp_path / "out" / "deep" / "b.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("by hand")
    status, printed = run("--language", "ro")
    assert status == 0 and "1 of 5 have a transcript" in printed.out
    assert kept.read_text() == "by hand" and len(written(tmp_path / "out")) == 5
    assert sum(call.shape[0] for call in generated) == 4
    status, printed = run("--language", "ro")
    assert status == 0 and "5 of 5" in printed.out and len(generated) == 1
    assert run("--language", "ro", "--overwrite")[0] == 0
    assert kept.read_text() != "by hand"


def test_an_interrupted_run_keeps_what_is_done(run, generated, monkeypatch, tmp_path):
    transcribe_waveforms = transcribe.transcribe_waveforms

    def interrupted(*args, **kwargs):
        if generated:
            raise KeyboardInterrupt
        return transcribe_waveforms(*args, **kwargs)

    monkeypatch.setattr(transcribe, "transcribe_waveforms", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--language", "ro", "--batch_size", 2)
    assert written(tmp_path / "out") == {"d.txt", "deep/er/c.txt"}
    monkeypatch.setattr(transcribe, "transcribe_waveforms", transcribe_waveforms)
    assert run("--language", "ro", "--batch_size", 2)[0] == 0
    assert len(written(tmp_path / "out")) == 5 and sum(call.shape[0] for call in generated) == 5


def test_a_transcript_grows_window_by_window(run, experts, recordings, monkeypatch, tmp_path):
    """Its .part is a valid file after each window, and holds what was heard if the work is interrupted."""
    arguments = ("--adapters", experts("ca"), "--language", "ca", "--output_format", "json")
    inputs = [recordings / "d.mp3", recordings / "a.wav"]
    assert run(*arguments, inputs=inputs)[0] == 0
    whole = read_json(tmp_path / "out")
    grown = {"a": [], "d": []}

    def read_parts():
        for name, seen in grown.items():
            part = tmp_path / "again" / f"{name}.json.part"
            if part.exists():
                segments = json.loads(part.read_text(encoding="utf-8"))["segments"]
                if segments not in seen:
                    seen.append(segments)

    generate = GenerationMixin.generate

    def generate_window(self, *args, **kwargs):
        read_parts()
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", generate_window)
    assert run(*arguments, inputs=inputs, output_dir=tmp_path / "again")[0] == 0
    assert read_json(tmp_path / "again") == whole  # and no .part is left
    assert len(grown["d"]) >= 2 and grown["a"]
    assert sorted(grown["d"], key=len) == grown["d"]
    for segments in grown["d"]:
        assert [segment["text"] for segment in segments] == [
            segment["text"] for segment in whole["d.json"]["segments"][: len(segments)]
        ]


@contextmanager
def interrupted_in_the_third_window(monkeypatch):
    generate, windows = GenerationMixin.generate, []

    def interrupted(self, *args, **kwargs):
        windows.append(1)
        if len(windows) == 3:
            raise KeyboardInterrupt
        return generate(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", interrupted)
        yield


def test_what_was_heard_before_an_interruption_is_kept(run, recordings, monkeypatch, tmp_path):
    inputs = [recordings / "d.mp3"]
    with interrupted_in_the_third_window(monkeypatch), pytest.raises(KeyboardInterrupt):
        run("--language", "ro", inputs=inputs)
    assert written(tmp_path / "out") == {"d.txt.part"}
    heard = (tmp_path / "out" / "d.txt.part").read_text(encoding="utf-8")
    assert heard.strip()
    assert run("--language", "ro", inputs=inputs)[0] == 0
    assert written(tmp_path / "out") == {"d.txt"}
    assert (tmp_path / "out" / "d.txt").read_text(encoding="utf-8").startswith(heard)


def test_without_an_output_dir_what_was_heard_before_an_interruption_is_printed(run, recordings, monkeypatch, capsys):
    with interrupted_in_the_third_window(monkeypatch), pytest.raises(KeyboardInterrupt):
        run("--language", "ro", inputs=[recordings / "d.mp3"], output_dir=None)
    assert f"{recordings / 'd.mp3'}: interrupted; what was heard up to " in capsys.readouterr().out


def test_nothing_is_half_written(monkeypatch, tmp_path):
    def full(*args):
        raise OSError("no space left")

    path = tmp_path / "new" / "a.txt"
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "text")
    assert not path.exists()


def test_two_recordings_of_one_transcript_are_refused(run, recordings, generated, tmp_path):
    soundfile.write(recordings / "a.flac", np.zeros(8000), 16000)
    status, printed = run("--language", "ro")
    assert status == 2
    assert f"{recordings / 'a.flac'} and {recordings / 'a.wav'} would both be written to" in printed.err
    assert not written(tmp_path / "out") and not generated
    # Without files to write, both are transcribed; the same file twice is one.
    assert run("--language", "ro", output_dir=None)[0] == 0
    assert run("--language", "ro", inputs=[recordings / "e.wav", recordings / "deep" / ".." / "e.wav"])[0] == 0
    assert written(tmp_path / "out") == {"e.txt"}


def test_a_table_does_not_lead_out_of_the_output_dir(run, recordings, tmp_path):
    table = recordings / "deep" / "table.csv"
    table.write_text(f"file_name\n../a.wav\n{recordings / 'e.wav'}\nb.flac\ngone.wav\n")
    status, printed = run("--language", "ro", inputs=[table])
    assert status == 1 and "gone.wav cannot be read: no such file" in printed.err
    assert written(tmp_path / "out") == {"a.txt", "e.txt", "b.txt"}


# ---------------------------------------------------------------- several processes (--num_processes)


def test_several_processes_hear_what_one_hears_and_one_that_dies_is_named(run, experts, recordings, monkeypatch):
    """Texts are printed: also what the process heard before it died."""
    whole = (recordings / "deep" / "b.flac").read_bytes()
    (recordings / "cut.flac").write_bytes(whole[: len(whole) // 2])  # its header can be read
    soundfile.write(recordings / "long.wav", np.random.default_rng(1).normal(0, 0.1, 30 * 16000), 16000)
    table = recordings / "metadata.csv"
    rows = [
        "file_name,language",
        "a.wav,ca",
        "deep/b.flac,ro",
        "deep/er/c.ogg,ca",
        "d.mp3,bg",
        "e.wav,",
        "cut.flac,ro",
    ]
    table.write_text("\n".join(rows) + "\n")
    arguments = ("--adapters", experts("ca", "ro"), "--batch_size", 2)
    status, alone = run(*arguments, inputs=[table], output_dir=None)
    assert status == 1 and "5 transcribed, 1 skipped" in alone.err

    receive, killed = transcribe_processes._Worker.receive, []

    def kill_in_the_second_window(worker):
        kind, content = receive(worker)
        if kind == "heard" and content[0].name == "long.wav":
            killed.append(worker.process)
            if len(killed) == 2:
                worker.process.kill()
        return kind, content

    monkeypatch.setattr(transcribe_processes._Worker, "receive", kill_in_the_second_window)
    table.write_text("\n".join([*rows, "long.wav,ca"]) + "\n")
    status, printed = run(*arguments, "--num_processes", 2, inputs=[table], output_dir=None)
    assert status == 1 and "5 transcribed, 2 skipped" in printed.err, printed.err
    for _, text in (alone, printed):
        assert f"skipped: audio {recordings / 'cut.flac'} cannot be read" in text
    assert f"skipped: {recordings / 'long.wav'}: its process was killed by signal 9" in printed.err
    assert "with fewer --num_processes or a smaller --batch_size if memory ran out" in printed.err
    lines = printed.out.splitlines()
    assert lines.pop().startswith(f"{recordings / 'long.wav'}: interrupted; what was heard up to ")
    assert sorted(lines) == sorted(alone.out.splitlines()) and len(set(lines)) == 5


@pytest.mark.parametrize(
    ("seconds", "size", "batches"),
    [
        ([3600, 3600], 8, [[3600], [3600]]),  # not both to one process
        ([100] * 4 + [1] * 10, 8, [[100, 100], [100], [100], [1] * 5, [1, 1], [1], [1], [1]]),
        ([1] * 20, 4, [[1] * 4] * 3 + [[1] * 4, [1, 1], [1], [1]]),
        ([0, 0], 2, [[0, 0]]),
    ],
    ids=str,
)
def test_recordings_are_dealt_out_by_their_length(seconds, size, batches):
    waiting, dealt = deque(SimpleNamespace(seconds=length) for length in seconds), []
    while waiting:
        batch = transcribe_processes._next_batch(waiting, 2, size)
        dealt.append([recording.seconds for recording in batch])
    assert dealt == batches


# ---------------------------------------------------------------- what is refused


def test_a_language_that_the_model_lacks_is_named_beside_recordings_of_unknown_language(run, recordings, generated):
    table = recordings / "metadata.csv"
    table.write_text("file_name,language\na.wav,yo\ne.wav,\n")
    status, printed = run(inputs=[table])
    assert status == 2 and "no token for the language yo" in printed.err and not generated


@pytest.mark.parametrize("processes", [1, 2])
def test_languages_that_detection_cannot_tell_apart_are_refused(run, recordings, generated, tmp_path, processes):
    arguments = ("--language", "ca", "ca-valencia", "--num_processes", processes)
    status, printed = run(*arguments)
    assert status == 2 and printed.err.splitlines()[-1] == (
        "error: 'ca' and 'ca-valencia' are both heard as 'ca', so detection cannot tell them apart: give the language "
        "of each recording in a table"
    )
    assert not generated and not written(tmp_path / "out")


def test_languages_of_a_table_need_not_be_told_apart_and_the_base_model_takes_dialects(
    run, recordings, generated, tmp_path
):
    table = recordings / "metadata.csv"
    table.write_text("file_name,language\na.wav,ca\ne.wav,ca-valencia\n")
    arguments = ("--language", "ca", "ca-valencia", "--output_format", "json")
    assert run(*arguments, inputs=[table])[0] == 0
    assert [call.language for call in generated] == [["ca", "ca"]]
    assert {entry["language"] for entry in read_json(tmp_path / "out").values()} == {"ca", "ca-valencia"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--language", "romanain"), "did you mean 'romanian'"),
        (("--language", "yo"), "no token for the language yo"),
        (("--model", "nobody/nothing"), "--model nobody/nothing cannot be used"),
        (("--adapters", "nobody/nothing"), "nobody/nothing is neither a folder here nor a repository"),
        (("--adapters", "{recordings}"), "holds no adapter of a language"),
        (("--adapters", "{experts}", "--language", "fr"), "none of the adapters is for fr: they are for ca, ro"),
        (("--batch_size", 0), "--batch_size is 0"),
        (("--num_beams", 0), "--num_beams is 0"),
        (("--num_processes", 0), "--num_processes is 0, expected at least 1"),
        (("--num_processes", "two"), "--num_processes: invalid int value: 'two'"),
        (("--device", "gpu"), "--device gpu cannot be used"),
        (("--output_dir", "{recordings}/a.wav"), "is a file, expected a folder"),
        (("--output_dir", "{recordings}/a.wav/b"), "is a file, expected a folder"),
        (("--output_format", "docx"), "invalid choice: 'docx'"),
        (("gone.wav",), "gone.wav does not exist"),
        (("{recordings}/notes.csv",), "notes.csv has no column 'file_name' of file names, but"),
        (("{recordings}/typo.csv",), "did you mean 'romanian'"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_transcribed(
    run, experts, recordings, generated, tmp_path, arguments, named
):
    (recordings / "notes.csv").write_text("name\na.wav\n")
    (recordings / "typo.csv").write_text("file_name,language\na.wav,romanain\n")
    places = {"recordings": recordings, "experts": experts("ca", "ro")}
    arguments = [str(argument).format(**places) for argument in arguments]
    if arguments[0].startswith("--"):
        inputs, output_dir = (recordings,), None if "--output_dir" in arguments else tmp_path / "out"
    else:
        inputs, arguments, output_dir = arguments, [], tmp_path / "out"
    status, printed = run(*arguments, inputs=inputs, output_dir=output_dir)
    assert status == 2
    assert named in printed.err and "Traceback" not in printed.err
    assert not generated and not written(tmp_path / "out")


def test_subtitles_need_a_folder(run):
    status, printed = run("--output_format", "srt", output_dir=None)
    assert status == 2 and "give an --output_dir" in printed.err


def test_a_folder_without_recordings_is_named(run, tmp_path):
    (tmp_path / "nothing").mkdir()
    status, printed = run(inputs=[tmp_path / "nothing"])
    assert status == 2 and f"no recording in {tmp_path / 'nothing'}" in printed.err and ".flac" in printed.err


def test_a_model_that_is_no_multilingual_whisper_is_named(run, base, tmp_path):
    config = json.loads((base.folder / "config.json").read_text())
    (base.folder / "config.json").write_text(json.dumps({**config, "model_type": "bart"}))
    status, printed = run()
    assert status == 2 and "it is a bart, expected a Whisper" in printed.err
    WhisperConfig(**config).save_pretrained(base.folder)
    path = base.folder / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "lang_to_id": None, "is_multilingual": False}))
    status, printed = run()
    assert status == 2 and "knows English only, expected a multilingual Whisper" in printed.err


def test_an_outdated_generation_config_is_named_and_the_remedy_works(run, base, generated):
    """Multilingual models fine-tuned in 2022 or 2023 have a generation config without languages."""
    path = base.folder / "generation_config.json"
    current = GenerationConfig.from_pretrained(base.folder)
    path.unlink()
    status, printed = run("--language", "ro")
    assert status == 2 and not generated
    assert f"--model {base.folder} is a multilingual Whisper with an outdated generation config" in printed.err
    assert f'GenerationConfig.from_pretrained("openai/whisper-small").save_pretrained("{base.folder}")' in printed.err
    current.save_pretrained(base.folder)
    assert run("--language", "ro")[0] == 0


def test_what_is_no_base_model_and_no_adapter_is_named_with_the_option_to_give_it(run, base, experts, tmp_path):
    folder = experts("ca")
    for given, what in ((folder / "ca", "an adapter"), (folder, "a folder of adapters")):
        status, printed = run("--model", given)
        assert status == 2 and f"--model {given} is {what}, expected a whole Whisper: give --model" in printed.err
        assert f"and --adapters {given}" in printed.err
    status, printed = run("--adapters", base.folder)
    assert status == 2 and f"{base.folder} holds no adapter of a language: it is a whole model" in printed.err
    get_peft_model(base.build(), LoraConfig(target_modules=["fc1"])).save_pretrained(tmp_path / "lora")
    status, printed = run("--adapters", tmp_path / "lora")
    assert status == 2 and "lora is an adapter of the method LORA. Merge it into its base model" in printed.err
    get_peft_model(base.build(), CLSRConfig.paper(**QUIET)).save_pretrained(tmp_path / "nameless")
    status, printed = run("--adapters", tmp_path / "nameless")
    assert status == 2 and "names no language, and 'nameless' is none" in printed.err


def test_a_mistyped_path_is_named_with_the_nearest_one(run, base, experts, tmp_path):
    status, printed = run("--model", tmp_path / "bose")
    assert status == 2
    assert (
        f"--model '{tmp_path}/bose' does not exist, expected a Whisper: a folder; did you mean '{tmp_path}/base'?"
        in printed.err
    )
    experts("ca")
    status, printed = run("--adapters", tmp_path / "expert" / "ca")
    assert status == 2 and f"did you mean '{tmp_path}/experts/ca'?" in printed.err
    status, printed = run("--model", base.folder / "config.json")
    assert status == 2 and "config.json is a file, expected a Whisper: a folder" in printed.err
    status, printed = run("--model", "~/no/such/model")
    assert status == 2 and "'~' is for the shell only" in printed.err
