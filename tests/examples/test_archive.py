"""`examples/transcribe_archive.py`: a real Ray on this machine, killed in the middle and started again."""

import argparse
import io
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile

pytest.importorskip("ray.data")
pa = pytest.importorskip("pyarrow")
psutil = pytest.importorskip("psutil")
datasets = pytest.importorskip("datasets")
import pyarrow.parquet as pq
from conftest import SPECIAL_TOKENS, build_tokenizer, build_whisper
from helpers import noise, random_clsr
from transformers import WhisperFeatureExtractor, WhisperProcessor

from peft_clsr import transcribe_waveforms

PAGE = Path(__file__).parents[2] / "examples" / "transcribe_archive.py"
TIMESTAMPS = [f"<|{position / 50:.2f}|>" for position in range(51)]
LANGUAGES = ("ca", "Romanian", "fr", None)  # French has no expert
TAGS = ("ca", "ro", "fr", "el")  # with --language el


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with the model `tiny`, of 1 s of context, and its `experts`."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = build_tokenizer([*SPECIAL_TOKENS, *TIMESTAMPS])
    whisper = build_whisper(tokenizer, init_std=0.2, vocab_size=len(tokenizer))
    whisper.generation_config.max_length = 12  # noise makes a random model talk without end
    whisper.save_pretrained(folder / "tiny")
    processor = WhisperProcessor(WhisperFeatureExtractor(chunk_length=1), tokenizer)
    processor.save_pretrained(folder / "tiny")
    model = random_clsr(whisper, "ca", "ro")
    model.save_pretrained(folder / "experts")
    return SimpleNamespace(folder=folder, model=model, processor=processor)


def waveform(index):
    return noise(0.6 + index % 3, seed=index)


def as_wav(samples):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16000, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def start(models, source, *options):
    paths = ["--model", "tiny", "--adapters", "experts", "--output_dir", "out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    settings = {"cwd": models.folder, "env": environment, "text": True, "start_new_session": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(list(map(str, [sys.executable, PAGE, source, *paths, *options])), **settings, **pipes)


def test_a_killed_run_goes_on_without_doing_work_twice(models):
    """Parquet as `datasets` writes it, with recordings of several languages and one that is broken."""
    size, out = 12, models.folder / "out"
    cells = [{"bytes": as_wav(waveform(index)), "path": f"{index}.wav"} for index in range(size)]
    cells.append({"bytes": b"no audio", "path": "broken.wav"})
    languages = [LANGUAGES[index % 4] for index in range(size)] + ["ca"]
    rows = datasets.Dataset.from_dict({"audio": cells, "language": languages})
    rows.cast_column("audio", datasets.Audio()).to_parquet(models.folder / "archive.parquet")
    options = ("--language", "el", "--part_size", 2, "--batch_size", 2)

    process = start(models, "archive.parquet", *options)
    deadline = time.monotonic() + 300  # on a busy machine
    while len(list(out.glob("*.parquet"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    started = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in started if "Transcribe" in " ".join(child.cmdline())]
    process.kill()
    assert workers and not psutil.wait_procs(workers, timeout=30)[1]  # Ray's workers end with it
    for child in psutil.wait_procs(started, timeout=1)[1]:  # Ray's agents may stay
        child.kill()
    parts = {path: path.read_bytes() for path in out.glob("*.parquet")}
    done = sum(pq.read_metadata(path).num_rows for path in parts)
    assert 0 < done < size

    process = start(models, "archive.parquet", *options, "--workers", 2)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    assert f"{done} of {size + 1} recordings are transcribed" in printed
    assert f"{size + 1 - done} transcribed now, 1 of them with an error" in printed
    assert all(path.read_bytes() == content for path, content in parts.items())
    found = {row["id"]: row for row in pq.read_table(out).to_pylist()}
    assert pq.read_table(out).num_rows == len(found) == size + 1
    broken = found.pop("broken.wav")
    assert "audio broken.wav cannot be read" in broken["error"] and broken["text"] is broken["segments"] is None
    for index in range(size):
        row, tag = found[f"{index}.wav"], TAGS[index % 4]
        (expected,) = transcribe_waveforms(models.model, models.processor, [waveform(index)], [tag])
        assert (row["language"], row["adapter"], row["model"]) == (tag, tag if tag in ("ca", "ro") else None, "tiny")
        assert (row["text"], row["segments"], row["error"]) == (expected.text, expected.segments, None)
        assert row["seconds"] == pytest.approx(0.6 + index % 3, abs=1e-3)
    assert any(row["text"] for row in found.values())


@pytest.fixture
def main(models, monkeypatch, capsys, tmp_path):
    """Runs the example in this process, where all is transcribed or refused: Ray is not started."""

    def call(source, **options):
        arguments = {"--model": models.folder / "tiny", "--output_dir": tmp_path / "out", **options}
        monkeypatch.setattr(sys, "argv", [str(part) for part in (PAGE, source, *sum(arguments.items(), ()))])
        monkeypatch.setattr("ray.init", lambda *args, **kwargs: pytest.fail("Ray is started"))
        try:
            runpy.run_path(str(PAGE), run_name="__main__")
        except SystemExit:
            return capsys.readouterr().err
        return capsys.readouterr().out

    return call


def test_folders_tables_and_parquet_of_paths_have_the_same_recordings(models, main, tmp_path):
    folder = tmp_path / "recordings"
    (folder / "deep").mkdir(parents=True)
    names = ["a.wav", "deep/b.wav", "cut.flac"]
    for index, name in enumerate(names):
        soundfile.write(folder / name, waveform(index), 16000)
    (folder / "deep" / "b.wav").write_bytes(b"no audio")
    (folder / "cut.flac").write_bytes((folder / "cut.flac").read_bytes()[:5000])
    (folder / "list.csv").write_text("file_name,language\n" + "".join(f"{name},ca\n" for name in names))
    (tmp_path / "out").mkdir()
    model = models.folder / "tiny"
    options = argparse.Namespace(
        model=str(model),
        adapters=[str(models.folder / "experts")],
        device="cpu",
        batch_size=8,
        output_dir=tmp_path / "out",
    )
    worker = runpy.run_path(str(PAGE))["Transcribe"](options, folder, {"ca": "ca"})
    counts = worker(pa.table({"id": names, "audio": names, "language": ["ca"] * 3})).to_pylist()
    assert counts == [{"recordings": 3, "errors": 2}]
    (part,) = (tmp_path / "out").iterdir()  # and nothing unfinished
    rows = {row["id"]: row for row in pq.read_table(part).to_pylist()}
    assert rows["a.wav"]["adapter"] == "ca" and rows["a.wav"]["error"] is None
    assert f"{folder / 'deep/b.wav'} cannot be read" in rows["deep/b.wav"]["error"]
    pq.write_table(pa.table({"audio": names}), tmp_path / "paths.parquet")
    for source in (folder, folder / "list.csv", tmp_path / "paths.parquet"):
        assert "3 of 3 recordings are transcribed" in main(source)
    assert f"has transcripts by {model}: give another --output_dir" in main(folder, **{"--model": "other"})


def test_bad_input_is_refused_before_ray_starts(main, tmp_path):
    pq.write_table(pa.table({"audio": ["a.wav", "a.wav"]}), tmp_path / "twice.parquet")
    pq.write_table(pa.table({"sound": ["a.wav"]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"audio": ["a.wav"], "language": ["romanain"]}), tmp_path / "typo.parquet")
    for name, message in (
        ("gone", "gone does not exist"),
        ("twice.parquet", "two recordings have the same path, or one has none: add a column id"),
        ("other.parquet", "audio"),
        ("typo.parquet", "did you mean 'romanian'"),
    ):
        assert message in main(tmp_path / name)
    assert not (tmp_path / "out").exists()
