"""The speech of the comparison: which messages are spoken, and that a data set is the listed one or none."""

import csv
import hashlib
import re
import shutil
import struct
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from benchmarks.comparison import speech
from examples.demo import speak
from examples.demo.fetch import FetchError, choose_recordings, fetch_package, keep_short, write_split


def sha256(data):
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


# ------------------------------------------------------------------------------------------------ the committed lists


@pytest.mark.parametrize("language", [*speech.LANGUAGES, *speech.UNTOUCHED_LANGUAGES])
def test_no_utterance_of_a_list_is_in_it_twice(language):
    with open(speech.SPLITS / f"{language}.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    sizes = Counter(row["split"] for row in rows)
    if language in speech.LANGUAGES:
        assert sizes.pop("train") > 200
        assert sizes == {"test": 100, "validation": 60, "out_of_domain": 100}
    else:
        assert sizes == {"test": 60}
    for column in ("name", "sha256"):  # of a recording's file, or of a text that is spoken
        assert len({row[column] for row in rows}) == len(rows)
    assert all(re.fullmatch("[0-9a-f]{64}", row["sha256"]) for row in rows)
    recording = re.compile(r"\w[\w.-]*_desc(_\w+)?\.ogg" if language == "en" else rf"\w[\w.-]*_desc_{language}\.ogg")
    spoken = re.compile(rf"\d\d\d_{language}(\+[fm]\d)?\.wav")
    for row in rows:
        assert (spoken if row["split"] == "out_of_domain" else recording).fullmatch(row["name"]), row["name"]
    voices = Counter(row["name"][3:-4] for row in rows if row["split"] == "out_of_domain")
    assert set(voices.values()) == ({25} if language in speech.LANGUAGES else set())


# ---------------------------------------------------------------------------------------------------- the messages


def write_catalogue(packages, package, language, messages):
    """A catalogue as msgfmt makes it, of source text to translation, in the place where a package has it."""
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n"} | messages
    columns = [[text.encode() for text in column] for column in zip(*sorted(messages.items()), strict=True)]
    count, strings, tables = len(messages), b"", []
    start = 28 + 2 * 8 * count
    for column in columns:
        for text in column:
            tables += [len(text), start + len(strings)]
            strings += text + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
    path = packages / package / "usr/share/locale" / language / "LC_MESSAGES" / f"{package}.mo"
    path.parent.mkdir(parents=True)
    path.write_bytes(header + struct.pack(f"<{len(tables)}I", *tables) + strings)


def test_messages_are_plain_sentences_of_a_few_words(tmp_path):
    messages = {
        "no memory": "memorie epuizată",
        "read error": "Eroare la citire.",
        "write\nerror": "eroare\n  la scriere",  # one line, however it was broken
        "is it so?": "s-a terminat, deci?",
        "%s: no file": "%s: fișierul lipsește",
        "two files": "2 fișiere citite",
        "error": "eroare",
        "many words": "unu doi trei patru cinci șase șapte opt nouă",
        "eight words": "unu doi trei patru cinci șase șapte opt",
        "not translated": "not translated",
        "empty": "",
        "read (and write)": "citire (și scriere)",
    }
    write_catalogue(tmp_path, "grep", "ro", messages)
    write_catalogue(tmp_path, "sed", "ro", {"out of memory": "memorie epuizată", "a line": "o linie"})
    write_catalogue(tmp_path, "vim", "ro", {"a word": "un cuvânt"})  # not one of the packages
    write_catalogue(tmp_path, "apt", "ca", {"a line": "una línia"})
    found = speech.read_messages(tmp_path, "ro")
    assert set(found.values()) == {
        "memorie epuizată",
        "Eroare la citire.",
        "eroare la scriere",
        "s-a terminat, deci?",
        "unu doi trei patru cinci șase șapte opt",
        "o linie",
    }
    assert list(found) == sorted(map(sha256, found.values()))
    assert speech.read_messages(tmp_path, "ca") == {sha256("una línia"): "una línia"}


def test_messages_are_in_the_script_of_the_language(tmp_path):
    write_catalogue(tmp_path, "apt", "bg", {"one": "няма достатъчно памет", "two": "грешка в apt"})
    assert list(speech.read_messages(tmp_path, "bg").values()) == ["няма достатъчно памет"]


def test_a_plural_is_read_in_each_of_its_forms(tmp_path):
    write_catalogue(tmp_path, "apt", "ro", {"a line\0many lines": "o linie\0multe linii\0multe de linii"})
    assert set(speech.read_messages(tmp_path, "ro").values()) == {"o linie", "multe linii", "multe de linii"}


def test_a_synthesizer_that_fails_or_is_missing_is_named(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "no such voice\n")
    monkeypatch.setattr(shutil, "which", lambda program: program)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **settings: failed)
    with pytest.raises(FetchError, match="the voice 'ro\\+x9' failed: no such voice"):
        speech.synthesize("o linie", "ro+x9", tmp_path / "a.wav")
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(FetchError, match="apt-get install espeak-ng"):
        speech.synthesize("o linie", "ro", tmp_path / "a.wav")


def test_a_new_language_is_spoken_in_two_splits_without_a_common_text(tmp_path, monkeypatch):
    monkeypatch.setattr(speak, "fetch_package", lambda package, target: None)
    monkeypatch.setattr(
        speak, "synthesize", lambda text, voice, target: target.write_bytes(f"{voice} {text}".encode())
    )
    write_catalogue(tmp_path / "packages", "tar", "eo", {f"text {i}": f"frazo {'a' * i}" for i in range(1, 63)})
    folder = speak.make_speech(tmp_path, "eo")
    texts = {}
    for split in ("train", "test"):
        with open(folder / split / "metadata.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        texts[split] = {row["transcription"] for row in rows}
        voice = rows[1]["file_name"].removesuffix(".wav").partition("_")[2]
        assert voice == "eo+f2" and rows[1]["language"] == "eo"
        spoken = (folder / split / rows[1]["file_name"]).read_bytes()
        assert spoken == f"{voice} {rows[1]['transcription']}".encode()
    assert (len(texts["train"]), len(texts["test"])) == (2, 60) and not texts["train"] & texts["test"]
    with pytest.raises(FetchError, match="'ky' has 0 messages in coreutils, .* more than the 60"):
        speak.make_speech(tmp_path, "ky")
    assert not (tmp_path / "espeak-ky").exists()


# ------------------------------------------------------------------------------------------------ lists and data sets


@pytest.fixture
def stamps(tmp_path):
    """An unpacked package of stamps: twelve recordings in Romanian of eleven texts, one of them too long."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "stamps" / "plants"
    folder.mkdir(parents=True)
    for i in range(12):
        text = f"O floare numărul {i}" if i else "O floare numarul 1."  # which is the text of another, normalized
        (folder / f"{i:02}.txt").write_text(f"Flower  {i}\nro.utf8={text}\nes.utf8=Una flor\n", encoding="utf-8")
        samples = generator.normal(0, 0.1, 16000 * (4 if i == 11 else 2))
        soundfile.write(folder / f"{i:02}_desc_ro.ogg", samples, 16000)
    return tmp_path / "stamps"


@pytest.fixture
def lists(tmp_path, monkeypatch):
    """The folder of the lists, which are of small splits; a synthesizer that takes 0.2 s a letter."""

    def synthesize(text, voice, target):
        soundfile.write(target, np.full(200 * len(text), 0.1), 1000)
        spoken.append((text, voice))

    spoken = []
    monkeypatch.setattr(speech, "SPLITS", tmp_path / "splits")
    monkeypatch.setattr(speech, "SPLIT_SIZES", {"test": 3, "validation": 2, "train": None})
    monkeypatch.setattr(speech, "OUT_OF_DOMAIN_UTTERANCES", 5)
    monkeypatch.setattr(speech, "synthesize", synthesize)
    texts = ["o linie", "un cuvânt", "o literă", "un rând", "un fișier", "o cale", "un nume cu multe cuvinte"]
    write_catalogue(tmp_path / "packages", "apt", "ro", {f"message {i}": text for i, text in enumerate(texts)})
    (tmp_path / "splits").mkdir()
    return spoken


def write_list(rows):
    with open(speech.SPLITS / "ro.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def write_romanian(stamps, folder):
    messages = speech.synthesized(folder / "packages", "ro")
    speech.write_language(stamps, "ro", folder / "compare" / "ro", messages, speech.SPLITS, speech.AUDIO_SECONDS)


def test_a_list_has_each_text_in_one_split_and_as_many_messages_as_asked(stamps, lists, tmp_path):
    rows = speech.list_language(stamps, tmp_path / "packages", "ro")
    assert Counter(row["split"] for row in rows) == {"test": 3, "validation": 2, "train": 5, "out_of_domain": 5}
    recorded = {row["name"] for row in rows if row["split"] != "out_of_domain"}
    assert recorded == {f"plants__{i:02}_desc_ro.ogg" for i in range(11) if i != 1}
    messages = speech.read_messages(tmp_path / "packages", "ro")
    short = [text for text in messages.values() if len(text) <= 15]  # of 3 s at most
    spoken = [row for row in rows if row["split"] == "out_of_domain"]
    assert [messages[row["sha256"]] for row in spoken] == short[:5]
    assert [row["name"] for row in spoken] == [
        "000_ro.wav",
        "001_ro+f2.wav",
        "002_ro+m3.wav",
        "003_ro+f4.wav",
        "004_ro.wav",
    ]
    assert [text for text, _ in lists if text in short] == short[:5]  # no more than are used


def test_a_data_set_is_what_is_listed(stamps, lists, tmp_path):
    write_list(speech.list_language(stamps, tmp_path / "packages", "ro"))
    lists.clear()
    target = tmp_path / "compare" / "ro"
    write_romanian(stamps, tmp_path)
    tables = {}
    for folder in target.iterdir():
        with open(folder / "metadata.csv", encoding="utf-8", newline="") as file:
            tables[folder.name] = list(csv.DictReader(file))
        assert {path.name for path in folder.iterdir()} == {
            "metadata.csv",
            *(row["file_name"] for row in tables[folder.name]),
        }
    assert {split: len(rows) for split, rows in tables.items()} == {
        "test": 3,
        "validation": 2,
        "train": 5,
        "out_of_domain": 5,
    }
    every = [row for rows in tables.values() for row in rows]
    assert {row["language"] for row in every} == {"ro"}
    (row,) = [row for row in every if row["file_name"] == "plants__07_desc_ro.ogg"]
    assert (row["transcription"], row["translation"]) == ("O floare numărul 7", "Flower 7")
    assert lists == [
        (row["transcription"], row["file_name"][4:-4]) for row in tables["out_of_domain"] if not row["translation"]
    ]
    assert len(lists) == 5

    before = target.stat().st_mtime_ns
    (speech.SPLITS / "ro.csv").unlink()
    write_romanian(stamps, tmp_path)  # is already there
    assert target.stat().st_mtime_ns == before


@pytest.mark.parametrize("split", ["train", "out_of_domain"])
def test_another_recording_or_message_than_the_listed_one_is_refused_and_nothing_is_left(
    split, stamps, lists, tmp_path
):
    rows = speech.list_language(stamps, tmp_path / "packages", "ro")
    wrong = [row for row in rows if row["split"] == split][-1]
    wrong["sha256"] = sha256("another")
    write_list(rows)
    with pytest.raises(FetchError, match=f"ro, {split}: {re.escape(wrong['name'])} is missing .* not the one listed"):
        write_romanian(stamps, tmp_path)
    assert list((tmp_path / "compare").iterdir()) == []


def test_a_listed_recording_that_is_not_there_is_refused(stamps, lists, tmp_path):
    write_list(speech.list_language(stamps, tmp_path / "packages", "ro"))
    (stamps / "plants" / "05_desc_ro.ogg").unlink()
    with pytest.raises(FetchError, match="plants__05_desc_ro.ogg is missing"):
        write_romanian(stamps, tmp_path)
    assert list((tmp_path / "compare").iterdir()) == []


# ------------------------------------------------------------------------------------------- examples/fetch_demo.py


def test_recordings_are_chosen_by_text_and_length(stamps):
    chosen, dropped = choose_recordings(stamps, "ro", 3.0)
    texts = [text for _, text in chosen]
    assert sorted(texts) == ["O floare numarul 1.", *sorted(f"O floare numărul {i}" for i in range(2, 11))]
    assert dropped == {"of a text that another recording reads": 1, "longer than 3 s": 1}
    normalized = [text.lower().replace("ă", "a").rstrip(".") for text in texts]
    assert normalized == sorted(normalized, key=sha256)
    assert len(choose_recordings(stamps, "ro")[0]) == 11
    with pytest.raises(FetchError, match="Language 'es' has no recordings in .* expected one of ro"):
        choose_recordings(stamps, "es")


def test_a_split_is_a_table_and_the_recordings_under_its_names(tmp_path):
    (tmp_path / "one.ogg").write_bytes(b"sound")
    write_split(
        tmp_path / "out" / "test", [{"file_name": "a.ogg", "transcription": "un, doi"}], [tmp_path / "one.ogg"]
    )
    assert (tmp_path / "out" / "test" / "a.ogg").read_bytes() == b"sound"
    table = (tmp_path / "out" / "test" / "metadata.csv").read_text()
    assert table == 'file_name,transcription\na.ogg,"un, doi"\n'


def test_long_recordings_are_left_out_of_the_test_split(tmp_path, capsys):
    rows = [{"file_name": f"{index}.wav", "transcription": f"unu, {index}"} for index in range(3)]
    write_split(tmp_path / "test", rows, [Path(__file__)] * 3)
    for row, seconds in zip(rows, (4.0, 4.1, 0.5), strict=True):
        (tmp_path / "test" / row["file_name"]).unlink()
        soundfile.write(tmp_path / "test" / row["file_name"], np.zeros(round(16000 * seconds)), 16000)
    for said in ("2 of 3 utterances have at most 4 s", ""):
        keep_short(tmp_path / "test")
        table = (tmp_path / "test" / "metadata.csv").read_text()
        assert table == 'file_name,transcription\n0.wav,"unu, 0"\n2.wav,"unu, 2"\n'
        assert said in capsys.readouterr().out
    assert len(list((tmp_path / "test").iterdir())) == 4  # files stay, and nothing else is there


def test_a_package_is_fetched_once_and_with_the_programs_of_debian(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match="'apt-get' was not found.*Debian package, sed"):
        fetch_package("sed", tmp_path / "sed")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "sed").mkdir()
    fetch_package("sed", tmp_path / "sed")
    assert list((tmp_path / "sed").iterdir()) == []
