"""
Count the words that a model invents in silence, noise and music, with and without `--vad`.

    make bench-silence
    python -m benchmarks.silence --adapters runs/with-no-speech/ro runs/without/ro --output silence.json

Each kind has ten recordings of a minute:
- silence: digital zeros in half of them, and noise at -70 dB, as a recorder's own, in the others;
- noise: white, pink and brown, at -50 to -20 dB, whose level swells slowly;
- music: three instrumental pieces of Debian's package asc-music (GPL-2+).

The control is speech: the demo's test recordings, in random order with pauses of 1 to 8 s between them. A model that
never writes a word invents none, so read its WER beside the invented words.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from examples.demo.fetch import fetch_package
from peft_clsr import TruncatedAudioError, error_rates, load_recordings, normalize_text, read_audio
from peft_clsr.files import to_json
from peft_clsr.inference.experts import load_with_experts
from peft_clsr.inference.transcribe import transcribe_speech, transcribe_waveforms

RATE = 16000
MUSIC_PACKAGE = "asc-music"
RECORDINGS = 10
KINDS = ("silence", "noise", "music")


def noise(length: int, exponent: float, decibels: float, generator: np.random.Generator) -> np.ndarray:
    """Noise whose power falls with frequency to the power `exponent`, float32 [length]."""
    spectrum = np.fft.rfft(generator.standard_normal(length))
    spectrum /= np.maximum(np.arange(len(spectrum)), 1) ** (exponent / 2)
    samples = np.fft.irfft(spectrum, length)
    samples *= 10 ** (decibels / 20) / np.sqrt(np.mean(samples**2))
    return samples.clip(-1, 1).astype(np.float32)


def make_sounds(seconds: float, cache_dir: Path, seed: int) -> dict[str, list[np.ndarray]]:
    """Recordings without speech of each kind, of `seconds` each."""
    generator = np.random.default_rng(seed)
    length = round(seconds * RATE)
    silence = [np.zeros(length, dtype=np.float32) for _ in range(RECORDINGS // 2)]
    silence += [noise(length, 0, -70, generator) for _ in range(RECORDINGS - len(silence))]
    noises = []
    for index in range(RECORDINGS):
        steady = noise(length, index % 3, generator.uniform(-50, -20), generator)
        period, phase = generator.uniform(3, 10), generator.uniform(0, 2 * np.pi)
        swell = 0.6 + 0.4 * np.sin(2 * np.pi * np.arange(length) / RATE / period + phase)
        noises.append((steady * swell).astype(np.float32))
    folder = cache_dir / MUSIC_PACKAGE
    fetch_package(MUSIC_PACKAGE, folder)
    pieces = [read_music(path) for path in sorted(folder.rglob("*.mp3"))]
    music = [pieces[index % 3][index // 3 * length :][:length] for index in range(RECORDINGS)]
    return {"silence": silence, "noise": noises, "music": music}


def read_music(path: Path) -> np.ndarray:
    """float32 [samples]. The headers of these MP3 files say a bit more than there is."""
    try:
        return read_audio(path)
    except TruncatedAudioError as error:
        return error.samples


def make_speech(dataset: str, language: str, seed: int, limit: int | None) -> tuple[list[np.ndarray], list[str]]:
    """The test recordings, joined to ten with pauses of 1 to 8 s, and what is said in each."""
    generator = np.random.default_rng(seed)
    rows = list(load_recordings(dataset, language, "test", limit=limit))
    order = generator.permutation(len(rows))
    waveforms, texts = [], []
    for part in np.array_split(order, RECORDINGS):
        sounds = []
        for row in part:
            sounds += [
                np.zeros(round(generator.uniform(1, 8) * RATE), dtype=np.float32),
                read_audio(rows[row]["audio"]),
            ]
        waveforms.append(np.concatenate(sounds))
        texts.append(" ".join(rows[row]["transcription"] for row in part))
    return waveforms, texts


def measure(transcribe: Any, sounds: dict[str, list[np.ndarray]], speech: Any, language: str) -> dict[str, float]:
    """Invented words of each kind, the WER of speech in percent, and the time of all in seconds."""
    start = time.perf_counter()
    row: dict[str, float] = {}
    for kind in KINDS:
        transcripts = transcribe(sounds[kind], [language] * RECORDINGS)
        row[kind] = sum(len(normalize_text(one.text, language).split()) for one in transcripts)
    waveforms, texts = speech
    heard = [one.text for one in transcribe(waveforms, [language] * len(waveforms))]
    row["wer"] = 100 * error_rates(heard, texts, [language] * len(texts))[language]["wer"]
    return row | {"seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/whisper-base", help="base Whisper")
    parser.add_argument("--adapters", nargs="*", default=[], help="folders of experts, each measured by itself")
    parser.add_argument("--dataset", default=".cache/tuxpaint-ro", help="recordings of speech, for the control")
    parser.add_argument("--language", default="ro", help="code")
    parser.add_argument("--cache_dir", type=Path, default=Path(".cache"), help="folder for the music")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each recording without speech")
    parser.add_argument("--limit", type=int, help="recordings of speech; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    sounds = make_sounds(arguments.seconds, arguments.cache_dir, arguments.seed)
    speech = make_speech(arguments.dataset, arguments.language, arguments.seed, arguments.limit)
    print("| | silence | noise | music | WER of speech | s |\n|---|---|---|---|---|---|")
    rows = {}
    for adapter in (None, *arguments.adapters):
        folders = [] if adapter is None else [adapter]
        model, processor = load_with_experts(arguments.model, folders, {arguments.language})
        model.eval()
        for function, name in ((transcribe_waveforms, ""), (transcribe_speech, ", --vad")):
            row = measure(partial(function, model, processor), sounds, speech, arguments.language)
            rows[f"{adapter or arguments.model}{name}"] = row
            words = " | ".join(f"{row[kind]:.0f}" for kind in KINDS)
            print(f"| {adapter or arguments.model}{name} | {words} | {row['wer']:.1f} % | {row['seconds']:.0f} |")
            if arguments.output is not None:
                arguments.output.write_text(to_json(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
