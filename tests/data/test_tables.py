"""Tables of recordings, and what `load_recordings` gives of folders and the Hub."""

import os
from pathlib import Path

import pytest

datasets = pytest.importorskip("datasets")

from peft_clsr.data.tables import load_recordings, read_table


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    """Two Romanian recordings and one Catalan to train on, with three spellings, and one to test on."""
    rows = ["0.wav,null,ro", "1.wav,12,Romanian", '2.wav,"unu, doi",ca_es']
    write(tmp_path / "mine" / "train" / "metadata.csv", "file_name,transcription,language", *rows)
    write(tmp_path / "mine" / "test" / "metadata.csv", "file_name,transcription,language", "9.wav,nou,ro")
    return tmp_path / "mine"


def test_cells_are_text_and_files_lie_beside_the_table(folder):
    rows = read_table(folder / "train" / "metadata.csv")
    assert [row["transcription"] for row in rows] == ["null", "12", "unu, doi"]
    assert [row["language"] for row in rows] == ["ro", "ro", "ca"]
    assert [row["file"] for row in rows] == [folder / "train" / f"{i}.wav" for i in range(3)]
    assert rows[0] == {
        "file_name": "0.wav",
        "transcription": "null",
        "language": "ro",
        "file": folder / "train" / "0.wav",
    }


def test_a_relative_table_gives_relative_files_and_an_absolute_name_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "some.csv", "file_name", "../a.wav", f"{tmp_path / 'b.wav'}")
    assert [row["file"] for row in read_table("some.csv")] == [Path("../a.wav"), tmp_path / "b.wav"]


def test_excel_mark_missing_cells_and_blank_lines_are_read(tmp_path):
    table = write(tmp_path / "some.csv", "\ufefffile_name,transcription,language", "a.wav", "", "b.wav,,")
    rows = read_table(table)
    assert [(row["file_name"], row["transcription"], row["language"]) for row in rows] == [
        ("a.wav", "", None),
        ("b.wav", "", None),
    ]
    assert read_table(write(tmp_path / "header.csv", "file_name")) == []
    (tmp_path / "empty.csv").write_text("")
    assert read_table(tmp_path / "empty.csv") == []


def test_common_voice_has_clips_and_does_not_quote(tmp_path):
    table = write(tmp_path / "train.tsv", "client_id\tpath\tsentence\tlocale", 'x\tone.mp3\t"Bon dia, va dir\tca')
    (row,) = read_table(table)
    assert row["sentence"] == '"Bon dia, va dir' and row["file"] == tmp_path / "clips" / "one.mp3"
    assert row["language"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name\na.wav\n", r"some.csv, line 2: a row without file_name.*'name'"),
        (b'file_name\na.wav\n""\n', "line 3: a row without file_name"),
        (b"file_name,language\na.wav,romanain\n", "some.csv, line 2: .*did you mean 'romanian'"),
        (b"file_name\na.wav,more\n", "line 2: a row with more than the 1 columns"),
        (b"file_name\n\xff.wav\n", "some.csv cannot be read after line .*utf-8"),
        (b"file_name\n" + b"a" * 200_000 + b"\n", "some.csv cannot be read after line 1: field larger than"),
    ],
)
def test_bad_tables_are_named_with_the_line(tmp_path, content, message):
    (tmp_path / "some.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "some.csv")


def test_a_language_takes_its_rows_with_all_columns(folder):
    rows = load_recordings(folder, "Romanian", audio_column="sound")
    assert rows.column_names == ["file_name", "transcription", "language", "sound", "modified"]
    assert rows["transcription"][:] == ["null", "12"] and rows["language"][:] == ["ro", "ro"]
    assert rows["sound"][:] == [str(folder / "train" / f"{i}.wav") for i in range(2)]
    assert rows.cache_files  # the rows are on the disk
    assert load_recordings(folder, "ca")["transcription"][:] == ["unu, doi"]
    assert load_recordings(folder, "ro", "test")["transcription"][:] == ["nou"]
    assert len(load_recordings(folder, "ro", limit=1)) == 1 and len(load_recordings(folder, "ro", limit=5)) == 2


def test_a_table_without_languages_gives_all_rows(tmp_path):
    write(tmp_path / "ca" / "dev.tsv", "path\tsentence", "one.mp3\tu", "two.mp3\tdos")
    rows = load_recordings(tmp_path, "ca", "dev", config="ca")
    assert rows.column_names == ["path", "sentence", "audio", "modified"]
    assert rows["audio"][:] == [str(tmp_path / "ca" / "clips" / name) for name in ("one.mp3", "two.mp3")]


def test_a_recording_that_was_replaced_changes_its_row(folder):
    recording = folder / "train" / "0.wav"
    assert load_recordings(folder, "ro")["modified"][:] == ["", ""]
    recording.write_bytes(b"")
    os.utime(recording, ns=(5, 5))
    before = load_recordings(folder, "ro")
    os.utime(recording, ns=(7, 7))
    after = load_recordings(folder, "ro")
    assert before["modified"][:] == ["5", ""] and after["modified"][:] == ["7", ""]
    assert before._fingerprint != after._fingerprint


def test_what_datasets_reads_is_read(tmp_path):
    datasets.Dataset.from_dict({"text": ["un", "dos", "tres"]}).to_parquet(tmp_path / "data" / "ca" / "train.parquet")
    rows = load_recordings(tmp_path / "data", "ca", config="ca", limit=2)
    assert rows["text"][:] == ["un", "dos"]


@pytest.mark.parametrize(
    ("language", "split", "message"),
    [
        ("ro", "dev", r"neither dev/metadata.csv nor dev.tsv, but has test, train: choose one of these"),
        ("el", "train", r"no row of language 'el'; it has \['ca', 'ro'\]"),
        ("romanain", "train", "did you mean 'romanian'"),
    ],
)
def test_a_split_or_language_that_is_missing_is_named(folder, language, split, message):
    with pytest.raises(ValueError, match=message):
        load_recordings(folder, language, split)


def test_tables_without_rows_and_rows_without_language_are_named(tmp_path):
    write(tmp_path / "train" / "metadata.csv", "file_name")
    write(tmp_path / "test" / "metadata.csv", "file_name,language", "a.wav,ro", "b.wav,")
    with pytest.raises(ValueError, match="metadata.csv has no rows"):
        load_recordings(tmp_path, "ro")
    with pytest.raises(ValueError, match="column 'language': row 2 is empty"):
        load_recordings(tmp_path, "ro", "test")


@pytest.mark.parametrize(
    ("revision", "source"),
    [
        (None, {"path": "google/fleurs", "name": "ca_es"}),
        ("v1", {"path": "google/fleurs", "name": "ca_es"}),
        ("refs/convert/parquet", {"path": "google/fleurs", "data_dir": "ca_es"}),
    ],
)
def test_what_the_hub_converted_has_folders_for_configurations(monkeypatch, revision, source):
    called = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda **kwargs: called.update(kwargs))
    load_recordings("google/fleurs", "ca", config="ca_es", revision=revision)
    assert called == {**source, "split": "train", "revision": revision}


def test_a_dataset_that_is_a_script_points_to_what_the_hub_converted(monkeypatch):
    def load_dataset(**kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found fleurs.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="no longer supported.*revision refs/convert/parquet"):
        load_recordings("google/fleurs", "ca", config="ca_es")


def test_a_dataset_that_is_neither_folder_nor_on_the_hub_is_named():
    with pytest.raises(ValueError, match="nobody/nothing.*expected a folder with train/metadata.csv"):
        load_recordings("nobody/nothing", "ca")
