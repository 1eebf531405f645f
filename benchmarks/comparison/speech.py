"""
Prepare the speech of the comparison: recordings in five languages, and synthesized speech as a second domain.

    python -m benchmarks.comparison.speech --cache_dir .cache

writes `.cache/compare/LANGUAGE/SPLIT` (`metadata.csv` beside the audio). `benchmarks/splits/LANGUAGE.csv` lists the
utterances: split, name and SHA-256, of the audio file for recordings, of the text for synthesized speech. All our
numbers are of the committed lists; `--list` makes them again.

Recordings: volunteers reading the descriptions of Tux Paint's stamps (GPL-2). Second domain: espeak-ng, in four of its
voices, speaking messages of command-line programs. Needs apt-get, dpkg and espeak-ng of Debian, but no root.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import soundfile
from tqdm import tqdm

from examples.demo.fetch import (
    STAMPS_PACKAGE,
    FetchError,
    choose_recordings,
    fetch_package,
    fetch_whisper,
    recording_name,
    scratch_folder,
    write_split,
)
from examples.demo.speak import CATALOGUES, VOICES, read_messages, synthesize

SPLITS = Path(__file__).parents[1] / "splits"
LANGUAGES = ("ro", "bg", "el", "be", "ca")
UNTOUCHED_LANGUAGES = ("en", "es")  # never trained on: an adapter of another language must not harm them
AUDIO_SECONDS = 3.0  # audio context; longer utterances are left out
FULL_CONTEXT = 30.0  # seconds, Whisper's own
SPLIT_SIZES = {"test": 100, "validation": 60, "train": None}  # by the order of the texts' hashes; the rest is "train"
UNTOUCHED_UTTERANCES = 60
OUT_OF_DOMAIN = "out_of_domain"
OUT_OF_DOMAIN_UTTERANCES = 100
# Writes the audio of a listed row to a path. Returns its text, `None` if it is not there, and its SHA-256.
OtherDomain = Callable[[dict[str, str], Path], tuple[str | None, str]]


def list_language(stamps: Path, packages: Path, language: str) -> list[dict[str, str]]:
    """The rows of a language's list."""
    chosen, _ = choose_recordings(stamps, language, AUDIO_SECONDS)
    sizes = SPLIT_SIZES if language in LANGUAGES else {"test": UNTOUCHED_UTTERANCES}
    rows, start = [], 0
    for split, size in sizes.items():
        end = len(chosen) if size is None else start + size
        for recording, _ in chosen[start:end]:
            digest = hashlib.sha256(recording.read_bytes()).hexdigest()
            rows.append({"split": split, "name": recording_name(recording, stamps), "sha256": digest})
        start = end
    if language not in LANGUAGES:
        return rows
    number = 0
    with scratch_folder(packages / "spoken") as scratch:
        for digest, text in read_messages(packages, language).items():
            if number == OUT_OF_DOMAIN_UTTERANCES:
                break
            voice = f"{language}{VOICES[number % len(VOICES)]}"
            spoken = scratch / f"{number}.wav"
            synthesize(text, voice, spoken)
            if soundfile.info(spoken).duration <= AUDIO_SECONDS:
                name = f"{number:03}_{voice}.wav"
                rows.append({"split": OUT_OF_DOMAIN, "name": name, "sha256": digest})
                number += 1
    return rows


def synthesized(packages: Path, language: str) -> OtherDomain:
    """The messages of a language, spoken by espeak-ng."""
    messages = read_messages(packages, language)

    def speak(row: dict[str, str], path: Path) -> tuple[str | None, str]:
        text = messages.get(row["sha256"])
        if text is not None:
            synthesize(text, row["name"].removesuffix(".wav").partition("_")[2], path)
        return text, row["sha256"]

    return speak


def write_language(
    stamps: Path, language: str, target: Path, other_domain: OtherDomain | None, lists: Path, max_seconds: float
) -> None:
    """
    Write the splits of a language, as listed, to the folder `target`.

    Args:
        stamps (`Path`): The unpacked recordings.
        language (`str`): The language.
        target (`Path`): Folder to make.
        other_domain (`OtherDomain`, *optional*): Makes the audio of a row out of domain.
        lists (`Path`): Folder of the lists.
        max_seconds (`float`): Of a recording, when the lists were made.

    Raises:
        FetchError: a recording or message is missing, or differs from the listed one.
    """
    if target.is_dir():
        print(f"{target}: already there")
        return
    texts = {}
    recordings = {recording_name(path, stamps): path for path in stamps.rglob("*.ogg")}
    for recording, text in choose_recordings(stamps, language, max_seconds)[0]:
        texts[recording_name(recording, stamps)] = text
    with open(lists / f"{language}.csv", encoding="utf-8", newline="") as file:
        listed = list(csv.DictReader(file))
    with scratch_folder(target) as scratch:
        (scratch / "spoken").mkdir()
        for split in dict.fromkeys(row["split"] for row in listed):
            rows, paths = [], []
            for row in tqdm([row for row in listed if row["split"] == split], desc=f"{language} {split}"):
                name = row["name"]
                if split == OUT_OF_DOMAIN:
                    path = scratch / "spoken" / name
                    text, digest = other_domain(row, path)
                else:
                    path, text = recordings.get(name), texts.get(name)
                    digest = path and hashlib.sha256(path.read_bytes()).hexdigest()
                if text is None or digest != row["sha256"]:
                    raise FetchError(
                        f"{language}, {split}: {name} is missing from the Debian packages, or not the one listed. "
                        "The lists are of Debian 12 (bookworm): use that release, or make your own lists with --list."
                    )
                translation = "" if split == OUT_OF_DOMAIN else english_description(path)
                rows.append(
                    {"file_name": name, "transcription": text, "language": language, "translation": translation}
                )
                paths.append(path)
            write_split(scratch / "dataset" / split, rows, paths)
        (scratch / "dataset").rename(target)


def write_list(path: Path, rows: list[dict[str, str]]) -> None:
    """Write the list of a language's utterances."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def english_description(recording: Path) -> str:
    """The English text of a recording: the first line of its stamp's description."""
    stamp = recording.name.rpartition("_desc")[0]
    lines = recording.with_name(f"{stamp}.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    return " ".join(lines[0].split())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--cache_dir", type=Path, default=Path(".cache"), help="folder to fetch into")
    parser.add_argument("--list", action="store_true", help="make the lists in benchmarks/splits again")
    arguments = parser.parse_args()
    cache = arguments.cache_dir
    fetch_whisper(cache / "whisper-base")
    fetch_package(STAMPS_PACKAGE, cache / STAMPS_PACKAGE)
    stamps = cache / STAMPS_PACKAGE / "usr/share/tuxpaint/stamps"
    for package in CATALOGUES:
        fetch_package(package, cache / "packages" / package)
    for language in (*LANGUAGES, *UNTOUCHED_LANGUAGES):
        if arguments.list:
            write_list(SPLITS / f"{language}.csv", list_language(stamps, cache / "packages", language))
        spoken = synthesized(cache / "packages", language) if language in LANGUAGES else None
        write_language(stamps, language, cache / "compare" / language, spoken, SPLITS, AUDIO_SECONDS)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # keeps our lines in order with those of apt-get
    try:
        main()
    except FetchError as error:
        sys.exit(f"error: {error}")
