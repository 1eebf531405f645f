"""Make speech of a language that has no recordings here: messages of command-line programs, spoken by espeak-ng.

    python -m examples.demo.speak --cache_dir .cache --language eo

writes `.cache/espeak-eo`, with `metadata.csv` beside the audio in train and test. Needs apt-get, dpkg and espeak-ng of
Debian, but no root. The speech is synthetic: it shows that a language can be trained, not how well people are heard.
"""

import argparse
import gettext
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from langcodes import Language

from .fetch import FetchError, fetch_package, scratch_folder, write_split

CATALOGUES = ("coreutils", "apt", "grep", "sed")  # Debian packages whose messages the synthesizer speaks
MORE_CATALOGUES = (*CATALOGUES, "bash", "tar")  # some languages have few messages
VOICES = ("", "+f2", "+m3", "+f4")  # espeak-ng's variants of a language's voice, in turn
WORDS = range(2, 9)  # words of a message
TEST_UTTERANCES = 60


def read_messages(folder: Path, language: str, packages: Iterable[str] = CATALOGUES) -> dict[str, str]:
    """
    Read the translated messages that can be spoken: plain sentences of a few words, without placeholders, digits,
    brackets, or Latin words in another script.

    Args:
        folder (`Path`): Has the unpacked packages.
        language (`str`): The code that catalogues have, "eo".
        packages (`Iterable[str]`, *optional*): Names of packages.

    Returns:
        `dict[str, str]`: SHA-256 of a text to the text, sorted.
    """
    is_latin = Language.get(language).maximize().script == "Latn"
    letter = "[^\\W\\d_]" if is_latin else "[^\\W\\d_A-Za-z]"
    plain = re.compile(rf"{letter}+(?:[ ,’'-]+{letter}+)*[.!?]?")
    messages = {}
    for package in packages:
        for path in sorted((folder / package).glob(f"usr/share/locale/{language}/LC_MESSAGES/*.mo")):
            with open(path, "rb") as file:
                catalogue = gettext.GNUTranslations(file)._catalog  # gettext has no public way to list messages
            for source, text in catalogue.items():
                text = " ".join(text.split()) if source and text != source else ""
                if plain.fullmatch(text) and len(text.split()) in WORDS:
                    messages[hashlib.sha256(text.encode()).hexdigest()] = text
    return dict(sorted(messages.items()))


def synthesize(text: str, voice: str, target: Path) -> None:
    """
    Speak `text` into the WAV file `target`.

    Raises:
        FetchError: espeak-ng is missing or fails.
    """
    if shutil.which("espeak-ng") is None:
        raise FetchError("'espeak-ng' was not found. On Debian and Ubuntu: apt-get install espeak-ng.")
    done = subprocess.run(["espeak-ng", "-v", voice, "-w", str(target), "--", text], capture_output=True, text=True)
    if done.returncode or not target.exists():
        raise FetchError(f"espeak-ng with the voice {voice!r} failed: {done.stderr.strip()}")


def make_speech(cache: str | Path, language: str) -> Path:
    """
    Make the spoken messages of a language, unless they are there.

    Args:
        cache (`str` or `Path`): Folder to fetch and write into.
        language (`str`): A code that espeak-ng and Debian's catalogues know, "eo".

    Returns:
        `Path`: a folder with train and test, for [`load_recordings`]. A text is in one of them only.

    Raises:
        FetchError: a program or package is missing, or the catalogues have too few messages.
    """
    cache = Path(cache)
    target = cache / f"espeak-{language}"
    if target.is_dir():
        print(f"{target}: already there")
        return target
    for package in MORE_CATALOGUES:
        fetch_package(package, cache / "packages" / package)
    messages = list(read_messages(cache / "packages", language, MORE_CATALOGUES).values())
    if len(messages) <= TEST_UTTERANCES:
        raise FetchError(
            f"Language '{language}' has {len(messages)} messages in {', '.join(MORE_CATALOGUES)}; expected more than "
            f"the {TEST_UTTERANCES} of the test split: choose another language."
        )
    splits = {"train": messages[TEST_UTTERANCES:], "test": messages[:TEST_UTTERANCES]}
    with scratch_folder(target) as scratch:
        (scratch / "spoken").mkdir()
        for split, texts in splits.items():
            rows, paths = [], []
            for number, text in enumerate(texts):
                voice = f"{language}{VOICES[number % len(VOICES)]}"
                rows.append({"file_name": f"{number:03}_{voice}.wav", "transcription": text, "language": language})
                paths.append(scratch / "spoken" / f"{split}-{number}.wav")
                synthesize(text, voice, paths[-1])
            write_split(scratch / "dataset" / split, rows, paths)
        (scratch / "dataset").rename(target)
    print(f"{target}: {len(splits['train'])} utterances for training, {len(splits['test'])} for testing")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--cache_dir", type=Path, default=Path(".cache"), help="folder to fetch into")
    parser.add_argument("--language", default="eo", help="language of espeak-ng and of the catalogues")
    arguments = parser.parse_args()
    make_speech(arguments.cache_dir, arguments.language)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # keeps our lines in order with those of apt-get
    try:
        main()
    except FetchError as error:
        sys.exit(f"error: {error}")
