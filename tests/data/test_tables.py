"""Tables of recordings, as the commands read them."""

import os

import pytest

datasets = pytest.importorskip("datasets")

from peft_clsr import load_recordings
from peft_clsr.data.tables import read_table


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "train").mkdir()
    return tmp_path


def test_a_table_gives_paths_and_cells_as_text(folder):
    table = folder / "train" / "metadata.csv"
    table.write_text('\ufefffile_name,transcription\na.wav,null\nb/c.wav,"1,5 m"\n\nd.wav\n', encoding="utf-8")
    rows = read_table(table)
    assert [file for file, _ in rows] == [folder / "train" / name for name in ("a.wav", "b/c.wav", "d.wav")]
    assert [row["transcription"] for _, row in rows] == ["null", "1,5 m", ""]


def test_quotes_in_common_voice_are_text_and_recordings_are_in_clips(folder):
    (folder / "train.tsv").write_text('client_id\tpath\tsentence\nx\ta.mp3\t"Bon dia\ny\tb.mp3\tNo"\n')
    rows = read_table(folder / "train.tsv")
    assert [(str(file), row["sentence"]) for file, row in rows] == [
        (str(folder / "clips" / "a.mp3"), '"Bon dia'),
        (str(folder / "clips" / "b.mp3"), 'No"'),
    ]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "has 0 rows of "),
        ("file_name,transcription\n", "has 0 rows of file_name, transcription"),
        ("name\na\n", "has no column 'file_name' of file names, but name: rename one"),
        ("file_name,transcription\na.wav,bon dia\nb.wav,un, dos\n", "line 3 has more cells than the 2 columns"),
    ],
)
def test_a_bad_table_is_named(folder, text, error):
    table = folder / "train" / "metadata.csv"
    table.write_text(text)
    with pytest.raises(ValueError, match=f"metadata.csv.*{error}"):
        read_table(table)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"file_name\na.wav\n\xff.wav\n", "after line .*utf-8"),
        (b"file_name\na.wav\n" + b"b" * 200_000 + b"\n", "after line 2: field larger than"),
    ],
    ids=["no UTF-8", "large cell"],
)
def test_a_file_that_is_no_table_is_named(folder, content, error):
    (folder / "some.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"some.csv cannot be read {error}"):
        read_table(folder / "some.csv")


def test_only_a_tsv_is_read_as_that_of_common_voice(folder):
    (folder / "METADATA.CSV").write_text("file_name\na.wav\n")
    (folder / "TRAIN.TSV").write_text("path\na.mp3\n")
    assert [file for file, _ in read_table(folder / "METADATA.CSV")] == [folder / "a.wav"]
    assert [file for file, _ in read_table(folder / "TRAIN.TSV")] == [folder / "clips" / "a.mp3"]


def test_a_relative_table_gives_relative_paths_and_an_absolute_name_stays(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "some.csv").write_text(f"file_name\n../a.wav\n{folder / 'b.wav'}\n")
    assert [str(file) for file, _ in read_table("some.csv")] == ["../a.wav", str(folder / "b.wav")]


def test_recordings_of_one_language_are_loaded(folder):
    rows = ["file_name,transcription,language", "a.wav,un,Catalan", "b.wav,unu,ro", "c.wav,dos,ca_es"]
    (folder / "train" / "metadata.csv").write_text("\n".join(rows) + "\n")
    recordings = load_recordings(folder, "catalan", "train")
    assert recordings["transcription"][:] == ["un", "dos"]
    assert recordings["audio"][:] == [str(folder / "train" / name) for name in ("a.wav", "c.wav")]
    assert load_recordings(folder, "ca", "train", limit=1, audio_column="sound")["sound"][:] == recordings["audio"][:1]
    with pytest.raises(ValueError, match="no row of language 'el'; it has"):
        load_recordings(folder, "el", "train")
    with pytest.raises(ValueError, match="neither test/metadata.csv nor test.tsv, but has train: set the split"):
        load_recordings(folder, "ca", "test")
    with pytest.raises(ValueError, match="did you mean 'catalan'"):
        load_recordings(folder, "catalann", "train")


def test_a_recording_that_was_replaced_changes_its_row(folder):
    (folder / "train" / "metadata.csv").write_text("file_name,transcription\na.wav,un\nb.wav,dos\n")
    recording = folder / "train" / "a.wav"
    loaded = []
    for time in (5, 7):
        recording.write_bytes(b"")
        os.utime(recording, ns=(time, time))
        loaded.append(load_recordings(folder, "ca", "train"))
    assert [recordings["modified"][:] for recordings in loaded] == [["5", ""], ["7", ""]]
    assert loaded[0]._fingerprint != loaded[1]._fingerprint
    assert loaded[0].cache_files  # the rows are on the disk


def test_a_folder_of_parquet_files_is_loaded(folder):
    rows = {"transcription": ["un", "dos", "tres"]}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "data" / "ca" / "test.parquet")
    recordings = load_recordings(folder / "data", "ca", "test", config="ca", limit=2)
    assert recordings["transcription"][:] == ["un", "dos"]


def test_the_language_stands_in_the_name_of_the_folder(folder):
    (folder / "ca" / "train").mkdir(parents=True)
    (folder / "ca" / "train" / "metadata.csv").write_text("file_name,transcription\na.wav,un\n")
    assert load_recordings(f"{folder}/{{language}}", "ca", "train")["transcription"][:] == ["un"]
    assert load_recordings(folder, "ca", "train", config="ca")["transcription"][:] == ["un"]
