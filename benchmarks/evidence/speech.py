"""
Prepare the recordings of the second round: three folds by text, and another domain.

    python -m benchmarks.evidence.speech --cache_dir .cache

writes `.cache/evidence/LANGUAGE/{fold0,fold1,fold2,out_of_domain}` (`metadata.csv` beside the audio).
`benchmarks/splits/folds/LANGUAGE.csv` lists the utterances: split, name and SHA-256, of the audio file for recordings,
of the text for synthesized speech. All our numbers are of the committed lists; `--list` makes them again.

Recordings: volunteers reading the descriptions of Tux Paint's stamps (GPL-2), each text once, up to 30 s. Second
domain: in Russian the telephone announcements of Asterisk (CC BY-SA 3.0), one professional speaker; in other languages
messages of command-line programs, spoken by espeak-ng. Needs apt-get and dpkg of Debian, and espeak-ng for languages
other than Russian, but no root.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
import sys
from pathlib import Path

import numpy as np
import soundfile

from benchmarks.comparison.folds import FOLDS, HUMAN, LANGUAGES, fold_name
from benchmarks.comparison.speech import (
    OUT_OF_DOMAIN,
    OUT_OF_DOMAIN_UTTERANCES,
    SPLITS,
    OtherDomain,
    synthesized,
    write_language,
    write_list,
)
from examples.demo.fetch import (
    MAX_SECONDS,
    STAMPS_PACKAGE,
    FetchError,
    choose_recordings,
    fetch_package,
    fetch_whisper,
    recording_name,
)
from examples.demo.speak import CATALOGUES, VOICES, read_messages

LISTS = SPLITS / "folds"
ANNOUNCEMENTS, ANNOUNCEMENTS_AUDIO = "asterisk-core-sounds-ru", "asterisk-core-sounds-ru-g722"
RATE = 16_000  # Hz, of G.722
MAX_ANNOUNCEMENT = 12.0  # seconds; longer ones are lists of many sentences
MAX_CHARACTERS_PER_SECOND = 25.0  # faster than the speaker reads: such an announcement says less than its text


def read_announcements(packages: Path) -> dict[str, tuple[Path, str]]:
    """
    Read the announcements that can be used, each text once: two words or more, no brackets or digits, at most 12 s.

    Args:
        packages (`Path`): Has the unpacked packages.

    Returns:
        `dict[str, tuple[Path, str]]`: name to audio file (G.722) and text, sorted.
    """
    texts = next((packages / ANNOUNCEMENTS).rglob("core-sounds-ru.txt.gz"))
    audio = {path.stem: path for path in (packages / ANNOUNCEMENTS_AUDIO).rglob("*.g722")}
    announcements, texts_read = {}, set()
    for line in gzip.decompress(texts.read_bytes()).decode().splitlines():
        name, separator, text = line.partition(":")
        text = " ".join(text.split())
        if line.startswith(";") or not separator or name not in audio or re.search(r"[][()<>\d]", text):
            continue
        if text in texts_read:
            continue
        seconds = audio[name].stat().st_size * 2 / RATE  # a byte has two samples
        if len(text.split()) >= 2 and seconds <= MAX_ANNOUNCEMENT and len(text) / seconds <= MAX_CHARACTERS_PER_SECOND:
            announcements[name] = audio[name], text
            texts_read.add(text)
    return dict(sorted(announcements.items()))


def announced(packages: Path) -> OtherDomain:
    """The announcements as WAV files."""
    import av

    announcements = read_announcements(packages)

    def decode(row: dict[str, str], path: Path) -> tuple[str | None, str]:
        audio, text = announcements.get(row["name"].removesuffix(".wav"), (None, None))
        if audio is None:
            return None, ""
        with av.open(str(audio), format="g722") as container:
            frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
        samples = np.concatenate(frames)
        soundfile.write(path, samples, RATE)
        return text, hashlib.sha256(audio.read_bytes()).hexdigest()

    return decode


def list_language(stamps: Path, packages: Path, language: str) -> list[dict[str, str]]:
    """The rows of a language's list: texts in the order of their hashes go to the folds in turn."""
    chosen, _ = choose_recordings(stamps, language)
    rows = []
    for fold in range(FOLDS):
        for recording, _ in chosen[fold::FOLDS]:
            digest = hashlib.sha256(recording.read_bytes()).hexdigest()
            rows.append({"split": fold_name(fold), "name": recording_name(recording, stamps), "sha256": digest})
    if language == HUMAN:
        for name, (audio, _) in read_announcements(packages).items():
            digest = hashlib.sha256(audio.read_bytes()).hexdigest()
            rows.append({"split": OUT_OF_DOMAIN, "name": f"{name}.wav", "sha256": digest})
    else:
        for number, digest in enumerate([*read_messages(packages, language)][:OUT_OF_DOMAIN_UTTERANCES]):
            name = f"{number:03}_{language}{VOICES[number % len(VOICES)]}.wav"
            rows.append({"split": OUT_OF_DOMAIN, "name": name, "sha256": digest})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--cache_dir", type=Path, default=Path(".cache"), help="folder to fetch into")
    add("--languages", nargs="+", choices=LANGUAGES, default=list(LANGUAGES), help="languages to write")
    add("--list", action="store_true", help="make the lists in benchmarks/splits/folds again")
    arguments = parser.parse_args()
    cache = arguments.cache_dir
    fetch_whisper(cache / "whisper-base")
    fetch_package(STAMPS_PACKAGE, cache / STAMPS_PACKAGE)
    stamps = cache / STAMPS_PACKAGE / "usr/share/tuxpaint/stamps"
    packages = cache / "packages"
    for language in arguments.languages:
        for package in (ANNOUNCEMENTS, ANNOUNCEMENTS_AUDIO) if language == HUMAN else CATALOGUES:
            fetch_package(package, packages / package)
        if arguments.list:
            write_list(LISTS / f"{language}.csv", list_language(stamps, packages, language))
        target = cache / "evidence" / language
        other_domain = announced(packages) if language == HUMAN else synthesized(packages, language)
        write_language(stamps, language, target, other_domain, LISTS, MAX_SECONDS)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # keeps our lines in order with those of apt-get
    try:
        main()
    except FetchError as error:
        sys.exit(f"error: {error}")
