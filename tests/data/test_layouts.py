"""Folders of recordings as people have them, as `load_recordings` reads them."""

import logging
import unicodedata

import huggingface_hub
import pytest

datasets = pytest.importorskip("datasets")

from peft_clsr import load_recordings
from peft_clsr.data.table_reader import log_once
from peft_clsr.inference.recordings import find_recordings


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Writes files by name into a folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    log_once.cache_clear()

    def write(**files):
        folder = tmp_path / "recordings"
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    return lambda files: write(**files)


def texts(folder, split="train", language="ro", **options):
    recordings = load_recordings(folder, language, split, **options)
    return recordings[options.get("text_column", "transcription")][:]


TRAIN = "file_name,transcription\n0.wav,zero\n"
TEST = "file_name,transcription\n1.wav,unu\n"
LAYOUTS = {
    "tables in folders": {"train/metadata.csv": TRAIN, "test/metadata.csv": TEST},
    "data in a folder data": {"data/train/metadata.csv": TRAIN, "data/test/metadata.csv": TEST},
    "JSON lines in folders": {
        "train/metadata.jsonl": '{"file_name": "0.wav", "transcription": "zero"}\n',
        "test/metadata.jsonl": '{"file_name": "1.wav", "transcription": "unu"}\n',
    },
    "tables of splits": {"train.csv": TRAIN, "test.csv": TEST},
    "tsv of splits": {"train.tsv": TRAIN.replace(",", "\t"), "test.tsv": TEST.replace(",", "\t")},
    "folders in names": {"metadata.csv": "file_name,transcription\ntrain/0.wav,zero\ntest/1.wav,unu\n"},
    "folders of Windows": {"metadata.csv": "file_name,transcription\ntrain\\0.wav,zero\n test\\1.wav ,unu\n"},
    "JSON lines in the root": {
        "metadata.jsonl": '{"file_name": "train/0.wav", "transcription": "zero"}\n'
        '{"file_name": "test/1.wav", "transcription": "unu"}\n'
    },
    "a column": {"metadata.csv": "file_name,transcription, Split\n0.wav,zero,Train \n1.wav,unu,TEST\n2.wav,x,\n"},
    "tables in any case": {"Train.CSV": TRAIN, "TEST.csv": TEST, "~$Train.csv": b"lock", ".~lock.TEST.csv#": b"lock"},
    "a table of another name": {"sheet.csv": "file_name;transcription;split\n0;zero;train\n1;unu;test\n"},
    "pairs": {"train/0.txt": "zero\n", "train/0.m4a": b"x", "test/1.txt": "unu", "test/1.m4a": b"x"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_splits_are_found(make, name):
    folder = make(LAYOUTS[name])
    assert (texts(folder), texts(folder, "test")) == (["zero"], ["unu"])
    with pytest.raises(ValueError, match="--train_split, --eval_split"):
        texts(folder, "valid")


def test_a_table_is_a_dataset_too(make):
    folder = make(LAYOUTS["a column"])
    assert texts(folder / "metadata.csv", "test") == ["unu"]


def test_unicode_text_of_excel_is_a_dataset_too(make):
    sheet = "file_name\ttranscription\tsplit\r\n0.wav\tbună\ttrain\r\n"
    folder = make({"sheet.txt": sheet.encode("utf-16"), "0.wav": b"x"})
    assert texts(folder / "sheet.txt") == ["bună"]


def test_a_workbook_in_the_folder_is_named(make):
    folder = make({"Recordings.xlsx": b"PK\x03\x04", "readme.me": ""})
    with pytest.raises(ValueError, match="a workbook is not read: save its sheet as 'CSV UTF-8' in the folder"):
        texts(folder)


def test_two_tables_of_one_split_are_refused(make):
    folder = make({"train/metadata.csv": TRAIN, "train/metadata.jsonl": "{}"})
    with pytest.raises(ValueError, match="metadata.csv and .*metadata.jsonl are both tables"):
        texts(folder)


# ---------------------------------------------------------------- no splits

ROWS = "".join(f"rec{i};Propoziția {'abcdefghij'[i % 10]}!;x\r\n" for i in range(20))


def test_a_spreadsheet_of_recordings_from_phones(make, caplog):
    header = "Fișier;Ce s-a spus;Notă\r\n".replace("ș", "ş")  # cp1250 has the letter with a cedilla only
    sheet = (header + ROWS.replace("ț", "ţ")).encode("cp1250")
    folder = make({"foaie.csv": sheet, **{f"telefon/rec{i}.m4a": b"x" for i in range(20)}})
    columns = {"file_column": "fişier", "text_column": "Ce s-a spus"}
    parts = {part: load_recordings(folder, "ro", part, **columns) for part in ("train", "validation", "test")}
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 16, "validation": 2, "test": 2}
    assert sum(len(set(rows["Ce s-a spus"][:])) for rows in parts.values()) == 10  # no sentence is in two parts
    files = {name: file for rows in parts.values() for name, file in zip(rows["Fişier"], rows["audio"], strict=True)}
    assert files == {f"rec{i}": str(folder / "telefon" / f"rec{i}.m4a") for i in range(20)}
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert said.count("is read as cp1250, cells separated by ';'") == 1
    assert said.count("split by text, each sentence in one part: 16 train, 2 validation, 2 test") == 1


def test_pairs_in_one_folder_are_split_by_text(make, caplog):
    files = {f"{i}.wav": b"x" for i in range(11)} | {f"{i}.txt": f"bună {'abcdefghij'[i]}" for i in range(10)}
    folder = make({**files, "0.txt": "bună\nziua ţie".encode("cp1250"), "README.txt": "text"})
    parts = [texts(folder, part) for part in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [8, 1, 1] and "bună ziua ţie" in sum(parts, [])
    assert (
        "1 recordings have no text file of the same name, and are not used: 10.wav" in caplog.text
        and "It is read as cp1250" in caplog.text
    )


def test_what_has_no_pair_is_named(make, caplog):
    files = {f"{i}.wav": b"x" for i in range(3)} | {f"{i}.txt": f"text {i}" for i in range(3)}
    more = {**{f"more/y{i}.flac": b"x" for i in range(4)}, "z.txt": "text", "w.en.srt": "", "notes.odt": b"x"}
    folder = make({**files, "0.en.vtt": "WEBVTT\n", **more})
    for part in ("train", "test"):
        texts(folder, part)
    assert [message for message in caplog.messages if "not used" in message] == [
        f"{folder}: 4 recordings have no text file of the same name, and are not used: more/y0.flac, more/y1.flac, "
        "more/y2.flac, ...",
        f"{folder}: 2 text files have no recording of the same name, and are not used: w.en.srt, z.txt",
    ]


@pytest.mark.parametrize("ending", [".txt", ".srt", ".ro.srt"])
@pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD")])
def test_pairs_may_differ_in_case_and_in_how_accents_are_encoded(make, caplog, forms, ending):
    audio, text = (unicodedata.normalize(form, "Bună") for form in forms)
    content = "ziua" if ending == ".txt" else "1\n00:00:01,000 --> 00:00:02,000\nziua\n"
    folder = make({f"train/{audio}.WAV": b"x", f"train/{text.lower()}{ending}": content})
    recordings = load_recordings(folder, "ro", "train")
    assert recordings["transcription"][:] == ["ziua"] and "not used" not in caplog.text
    assert recordings["audio"][:] == [str(folder / "train" / f"{audio}.WAV")]


@pytest.mark.parametrize("ending", [".txt", ".srt"])
def test_names_that_differ_in_case_alone_keep_their_texts(make, ending):
    content = "" if ending == ".txt" else "1\n00:00:01,000 --> 00:00:02,000\n"
    folder = make({f"train/{name}{end}": content + name for name in "aA" for end in (".wav", ending)})
    assert texts(folder) == ["A", "a"]


def test_each_language_is_split_alone(make):
    rows = [f"{i}.wav,text {'abcdef'[i // 2]},{'ro' if i % 2 else 'ca'}" for i in range(12)]
    folder = make({"metadata.csv": "\n".join(["file_name,transcription,language", *rows])})
    for language in ("ro", "ca"):
        parts = [texts(folder, part, language) for part in ("train", "validation", "test")]
        assert [len(part) for part in parts] == [4, 1, 1]


def test_recordings_that_cannot_be_split_are_refused(make):
    folder = make({"metadata.csv": "file_name,transcription\n0.wav,da\n1.wav,nu\n"})
    with pytest.raises(ValueError, match="metadata.csv, ro: 2 different sentences cannot be split"):
        texts(folder)
    with pytest.raises(ValueError, match="metadata.csv has no column 'text', but file_name, transcription: set"):
        texts(folder, text_column="text")


# ---------------------------------------------------------------- files


def test_a_name_finds_its_file_in_other_spellings(make):
    names = ["a", "rec/b", "c.WAV", unicodedata.normalize("NFD", "bună.wav"), "./d.wav", "gone.wav"]
    found = ["x/a.m4a", "rec/b.webm", "x/c.wav", "bună.wav", "d.wav"]
    rows = [f"{name},text {i}" for i, name in enumerate(names)]
    files = {f"train/{file}": b"x" for file in [*found, "a.txt", "y/b.wav"]}
    folder = make({"train/metadata.csv": "\n".join(["file_name,transcription", *rows]), **files})
    audio = load_recordings(folder, "ro", "train")["audio"][:]
    assert audio == [str(folder / "train" / file) for file in [*found, "gone.wav"]]


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ("a.wav,da\n ,nu\n", "line 3 has no file_name"),
        ("a.wav,da\nx/b.wav,nu\na.wav,nu\n", "line 4 has the recording 'a.wav' of line 2 again"),
        ("a.wav,da\nx/b.wav,nu\na,nu\n", "line 4 has the recording 'a' of line 2 again"),
        ("a.wav,da\nb,nu\n", "line 3: the name 'b' fits .*x/b.wav and .*y/b.wav"),
    ],
)
def test_a_name_that_says_no_file_or_one_twice_is_refused(make, rows, error):
    files = {f"train/{file}": b"x" for file in ("a.wav", "x/b.wav", "y/b.wav")}
    folder = make({"train/metadata.csv": "file_name,transcription\n" + rows, **files})
    with pytest.raises(ValueError, match=f"train/metadata.csv, {error}"):
        texts(folder)


def test_missing_transcripts_are_counted_and_named(make, caplog):
    folder = make({"train/metadata.csv": TRAIN + "1.wav,\n2.wav, \n3.wav\n4.wav,\n"})
    assert len(texts(folder)) == 5
    assert (
        "4 of 5 rows have no transcription, and are used only as recordings without speech (no_speech): "
        in caplog.text
    )
    assert "metadata.csv, line 3, " in caplog.text and caplog.text.rstrip().endswith(", line 5, ...")


# ---------------------------------------------------------------- languages

LANGUAGES = ["Romanian", "en", " ro-RO ", "RO"]


@pytest.mark.parametrize("header", ["language", "Language", " LANGUAGE "])
@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet"])
def test_the_language_column_is_obeyed_in_any_source(make, caplog, header, source):
    caplog.set_level(logging.INFO, "peft_clsr")
    rows = [{"file_name": f"{i}.wav", "transcription": f"{i}", header: name} for i, name in enumerate(LANGUAGES)]
    folder = make({"README.md": ""})
    table = datasets.Dataset.from_list(rows)
    (folder / "train").mkdir()
    if source == "csv":
        table.to_csv(folder / "train" / "metadata.csv")
    elif source == "jsonl":
        table.to_json(folder / "train" / "metadata.jsonl")
    else:
        table.to_parquet(folder / "train-00000-of-00001.parquet")
    assert texts(folder) == ["0", "2", "3"]
    assert texts(folder, language="en") == ["1"]
    assert "3 rows of ro; of other languages, not used: 1 of en" in caplog.text
    with pytest.raises(ValueError, match="no row of language 'ca'; it has 2 of ro, 1 of en, 1 of ro-RO"):
        texts(folder, language="ca")


@pytest.mark.parametrize("name", ["metadata.csv", "train.parquet"])
def test_only_languages_that_nobody_loads_are_not_used(make, caplog, name):
    caplog.set_level(logging.INFO, "peft_clsr")
    rows = [f"train/{i}.wav,{i},{code}" for i, code in enumerate(["ro", "ca", "en", "ca"])]
    folder = make({"metadata.csv": "\n".join(["file_name,transcription,language", *rows])})
    if name == "train.parquet":
        datasets.Dataset.from_csv(str(folder / "metadata.csv")).to_parquet(folder / name)
        (folder / "metadata.csv").unlink()
    for _ in range(2):
        for language, other in (("ro", "Catalan"), ("ca", "ro")):
            texts(folder, language=language, languages=[other])
    said = [message for _, _, message in caplog.record_tuples if " rows of " in message]
    assert [message.partition(": ")[2] for message in said] == [
        "1 rows of ro; of other languages, not used: 1 of en",
        "2 rows of ca; of other languages, not used: 1 of en",
    ]


def test_class_labels_are_languages_and_numbers_are_refused(make):
    folder = make({"README.md": ""})
    types = {"transcription": datasets.Value("string"), "language": datasets.ClassLabel(names=["ca_es", "ro_ro"])}
    rows = {"transcription": ["un", "unu"], "language": [0, 1]}
    datasets.Dataset.from_dict(rows, datasets.Features(types)).to_parquet(folder / "train.parquet")
    assert texts(folder) == ["unu"]
    datasets.Dataset.from_dict(rows).to_parquet(folder / "train.parquet")
    with pytest.raises(ValueError, match="column 'language' holds int64; expected names or codes"):
        texts(folder)


def test_what_is_no_language(make, caplog):
    folder = make({"train/metadata.csv": "file_name,transcription,language\n0.wav,da,ro\n1.wav,nu,romanain\n"})
    with pytest.raises(ValueError, match="metadata.csv, line 3, column 'language'.*did you mean 'romanian'"):
        texts(folder)
    make({"train/metadata.csv": "file_name,transcription,language\n0.wav,da,ro\n1.wav,nu,\n"})
    with pytest.raises(ValueError, match="metadata.csv, line 3 has no language"):
        texts(folder)
    # A dataset of the Hub cannot be mended, so such rows are of another language.
    rows = {"transcription": ["da", "oo", "x"], "language": ["ro", "tongue of the hills", None]}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "mixed" / "train.parquet")
    assert texts(folder / "mixed") == ["da"]
    datasets.Dataset.from_dict({k: v[1:2] for k, v in rows.items()}).to_parquet(folder / "one" / "train.parquet")
    assert texts(folder / "one", language="tl") == ["oo"]
    assert "language 'tongue of the hills', which is no language tag: all rows are taken as 'tl'" in caplog.text


@pytest.mark.parametrize("name", ["metadata.csv", "train.parquet"])
def test_a_dialect_is_taken_for_its_language_unless_it_is_loaded_itself(make, caplog, name):
    rows = ["0.wav,hola,ca", "1.wav,xiquet,ca-valencia", "2.wav,muraho,rw", "3.wav,adeu,ca_ES"]
    folder = make(
        {"metadata.csv": "\n".join(["file_name,transcription,language,split"] + [f"{row},train" for row in rows])}
    )
    if name == "train.parquet":
        datasets.Dataset.from_csv(str(folder / "metadata.csv")).to_parquet(folder / name)
        (folder / "metadata.csv").unlink()
    assert texts(folder, language="ca") == ["hola", "xiquet", "adeu"]
    assert [text for text in caplog.messages if "the rows of ca-valencia are taken for ca, which is broader" in text]
    assert texts(folder, language="ca", languages=["ca-valencia"]) == ["hola", "adeu"]
    assert texts(folder, language="ca_valencia", languages=["ca"]) == ["xiquet"]
    assert texts(folder, language="Kinyarwanda") == ["muraho"]
    with pytest.raises(ValueError, match="no row of language 'gsw-CH'; it has"):
        texts(folder, language="gsw-CH")


# ---------------------------------------------------------------- torchcodec


def test_audio_of_parquet_files_is_not_decoded(make):
    folder = make({"statistics.csv": "speaker,seconds\nx,5\n"})
    audio = [{"bytes": b"x", "path": "0.wav"}]
    kind = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    rows = datasets.Dataset.from_dict({"audio": audio}, datasets.Features({"audio": kind}))
    rows.cast_column("audio", datasets.Audio()).to_parquet(folder / "train.parquet")
    assert load_recordings(folder, "ro", "train")[0]["audio"] == audio[0]


def test_the_root_cause_is_said(make, monkeypatch):
    folder = make({"0.wav": b"x"})

    def load_dataset(**kwargs):
        try:
            raise ImportError("To support encoding audio data, please install 'torchcodec'.")
        except ImportError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="An error occurred: To support encoding.*neither a table .* nor a text file"):
        texts(folder)
    # Audio files on the Hub are downloaded, and read as those in a folder.
    copied = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kwargs: copied.append((name, kwargs)) or folder
    )
    make(LAYOUTS["folders in names"])
    assert texts("me/speech", revision="v1") == ["zero"]
    assert copied == [("me/speech", {"repo_type": "dataset", "revision": "v1"})]


def test_a_revision_is_for_the_hub(make):
    folder = make(LAYOUTS["pairs"])
    for name in (folder, "mdc:abc"):
        with pytest.raises(ValueError, match="revision is 'v1', a branch.* is not read from the Hub: leave the revi"):
            texts(name, revision="v1")


# ---------------------------------------------------------------- transcribe


def test_tables_to_transcribe_are_read_the_same_way(make):
    table = "File_Name;LANGUAGE \r\nx\\café.wav;Catalan\r\nb;\r\n".encode("cp1252")
    folder = make({"list.csv": table, "x/café.wav": b"x", "b.m4a": b"x", "more.jsonl": '{"file_name": "c.wav"}\n'})
    found = find_recordings([folder / "list.csv", folder / "more.jsonl"], folder / "out", "text", "ca")
    assert [(r.path, r.output, r.language) for r in found] == [
        (folder / "x" / "café.wav", folder / "out" / "x" / "café.txt", "ca"),
        (folder / "b.m4a", folder / "out" / "b.txt", "ca"),
        (folder / "c.wav", folder / "out" / "c.txt", "ca"),
    ]
    for content, error in (
        (table, "list.csv cannot be read after line 1: line 2 is not utf-8"),
        (b"file_name,language\na.wav,ro,x\n", "list.csv, line 2 has more cells"),
        (b"file_name,language\na.wav,ro\n,ro\n", "list.csv, line 3 has no file_name"),
        (b"file_name,language\na.wav,romanain\n", "list.csv, line 2, column 'language'.*did you mean"),
    ):
        make({"list.csv": content})
        with pytest.raises(ValueError, match=error):
            find_recordings([folder / "list.csv"], None, "text")


def test_a_table_of_segments_to_transcribe_is_one_of_whole_recordings_of_one_language(make, caplog):
    rows = ["file_name,start,end,language", "a.wav,0,2,", "a.wav,2,4,ca", "b.wav,0,1,ro", "c.wav,,,"]
    folder = make({"list.csv": "\n".join(rows) + "\n", "a.wav": b"x", "b.wav": b"x", "c.wav": b"x"})
    for inputs in ([folder / "list.csv"], [folder, folder / "list.csv"]):
        found = find_recordings(inputs, language="fr")
        languages = {r.path.name: r.language for r in found}
        assert languages == {"a.wav": "ca", "b.wav": "ro", "c.wav": "fr"} and len(found) == 3
    message = f"{folder / 'list.csv'}: the times in 'start' and 'end' are not used: recordings are transcribed whole"
    assert caplog.messages.count(message) == 1
    make({"list.csv": "\n".join([*rows, "a.wav,4,5,ro"]) + "\n"})
    with pytest.raises(ValueError, match="a.wav has the languages 'ca' and 'ro': .*give it one"):
        find_recordings([folder / "list.csv"])
    make({"more.csv": "file_name,language,start,end\na.wav,es,,\n"})
    caplog.clear()
    assert [r.language for r in find_recordings([folder / "more.csv"])] == ["es"] and not caplog.messages
