"""A cache of recordings for the measurements of many small trainings."""

import numpy as np
import pytest
import soundfile
from conftest import SPECIAL_TOKENS, build_tokenizer
from transformers import WhisperFeatureExtractor, WhisperProcessor


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
