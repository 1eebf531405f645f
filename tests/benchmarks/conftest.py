"""A cache of recordings for the measurements of many small trainings."""

import sys
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import SPECIAL_TOKENS, build_tokenizer
from evidence_runs import SECONDS as EVIDENCE_SECONDS
from evidence_runs import made_up_results, validated_alone
from transformers import WhisperFeatureExtractor, WhisperProcessor
from transformers.utils import logging


@pytest.fixture
def small_cache(tmp_path, tiny_whisper, monkeypatch):
    """A folder with a tiny Whisper and, in "cache", noise that is said to be Romanian and Catalan."""
    from benchmarks import small_runs

    monkeypatch.setattr(small_runs, "fetch_whisper", lambda target: None)
    tokenizer = build_tokenizer([*SPECIAL_TOKENS, *(f"<|{position / 50:.2f}|>" for position in range(51))])
    whisper = tiny_whisper(max_target_positions=448, init_std=0.2, vocab_size=len(tokenizer))
    whisper.generation_config.max_length = 12
    for part in (whisper, WhisperProcessor(WhisperFeatureExtractor(chunk_length=1), tokenizer)):
        part.save_pretrained(tmp_path / "whisper")
    generator = np.random.default_rng(0)
    for language in ("ro", "ca"):
        for split, size in (("train", 4), ("test", 2)):
            folder = tmp_path / "cache" / f"tuxpaint-{language}" / split
            folder.mkdir(parents=True)
            lines = ["file_name,transcription,language"]
            for i in range(size):
                soundfile.write(folder / f"{i}.wav", generator.normal(0, 0.1, 3000), 16000)
                lines.append(f"{i}.wav,frase {i},{language}")
            (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def short_windows(monkeypatch):
    """Makes a module pack to what the tiny Whisper knows: windows of a second, without timestamps."""

    def change(module):
        pack = module.pack_utterances
        small = {"max_seconds": 1.0, "timestamps": 0}
        monkeypatch.setattr(module, "pack_utterances", lambda *args, **kwargs: pack(*args, **kwargs | small))

    return change


@pytest.fixture
def evidence_setup(tiny_whisper, tmp_path, monkeypatch):
    """A student of a context of 2 s, and noise as `benchmarks/evidence/speech.py` lays it out."""
    from benchmarks.comparison import experiment
    from benchmarks.comparison.store import ResultStore

    times = [f"<|{position / 50:.2f}|>" for position in range(int(50 * EVIDENCE_SECONDS) + 1)]
    tokenizer = build_tokenizer([*SPECIAL_TOKENS, *times])
    model = tiny_whisper(
        init_std=0.5,
        max_source_positions=int(50 * EVIDENCE_SECONDS),
        max_target_positions=448,
        vocab_size=len(tokenizer),
    )
    model.generation_config.max_length = 12
    for part in (model, WhisperProcessor(WhisperFeatureExtractor(chunk_length=int(EVIDENCE_SECONDS)), tokenizer)):
        part.save_pretrained(tmp_path / "student")
    generator = np.random.default_rng(0)
    for language in ("ro", "ca"):
        for split in ("fold0", "fold1", "fold2", "out_of_domain"):
            folder = tmp_path / "data" / language / split
            folder.mkdir(parents=True)
            lines = ["file_name,transcription,language,translation"]
            for place in range(4):
                soundfile.write(folder / f"{place}.wav", generator.normal(0, 0.1, 6000 + 1000 * place), 16000)
                lines.append(f"{place}.wav,floare {split} {place},{language},Flower")
            (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    settings = {"FULL_CONTEXT": EVIDENCE_SECONDS, "MAX_NEW_TOKENS_OF_LONG": 8, "GRID_LANGUAGES": ("ro", "ca")}
    for name, value in settings.items():
        monkeypatch.setattr(experiment, name, value)
    monkeypatch.setattr("benchmarks.comparison.folds.VALIDATION", 2)
    monkeypatch.setitem(experiment.WINDOWS, "timestamps", 0.0)
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    store = ResultStore(tmp_path / "results", tmp_path / "work", "student")
    yield experiment.Setup(str(tmp_path / "student"), tmp_path / "data", store, "float32", 1, None)
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)
    datasets.enable_progress_bars()


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Makes a function that calls a module's command on folders of the test, and returns what came into `done`."""
    from benchmarks.comparison import compare

    def make(module, done):
        monkeypatch.setattr(compare, "ProcessPoolExecutor", lambda jobs, **settings: ThreadPoolExecutor(jobs))
        for name in ("OMP_NUM_THREADS", "TQDM_DISABLE"):  # `main` sets them
            monkeypatch.setenv(name, "1")
        (tmp_path / "data").mkdir(exist_ok=True)
        folders = [f"--{name}_dir={tmp_path / name}" for name in ("data", "results", "work")]

        def call(*arguments):
            done.clear()
            monkeypatch.setattr(sys, "argv", [module.__name__, *folders, *map(str, arguments)])
            module.main()
            return list(done)

        return call

    return make


@pytest.fixture
def pretended(command, monkeypatch):
    """Makes a function that calls a module's command, but nothing is trained. It returns tasks and runs, in order."""
    from benchmarks.evidence import steps

    def make(module, measure, teacher_of):
        done = []

        def pretend(task):
            def do(made, setup):
                assert not made.teacher or setup.store.weights(teacher_of(made)).exists()
                done.append((task, made))
                path = setup.store.weights(made)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
                if task != "train_alone":
                    result = made_up_results(made)
                    setup.store.write(made, validated_alone(result) if task == "validate" else result)
                return made.name

            return do

        for place, task in ((steps, "train_alone"), (module, measure), (module, "validate")):
            monkeypatch.setattr(place, task, pretend(task))
        return command(module, done)

    return make
