"""Tables of recordings, as the commands read them."""

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
        ("name\na\n", "expected some, with a column 'file_name'"),
        ("file_name,transcription\na.wav,bon dia\nb.wav,un, dos\n", "line 3 has more cells than the 2 columns"),
    ],
)
def test_a_bad_table_is_named(folder, text, error):
    table = folder / "train" / "metadata.csv"
    table.write_text(text)
    with pytest.raises(ValueError, match=f"metadata.csv.*{error}"):
        read_table(table)


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


def test_the_language_stands_in_the_name_of_the_folder(folder):
    (folder / "ca" / "train").mkdir(parents=True)
    (folder / "ca" / "train" / "metadata.csv").write_text("file_name,transcription\na.wav,un\n")
    assert load_recordings(f"{folder}/{{language}}", "ca", "train")["transcription"][:] == ["un"]
    assert load_recordings(folder, "ca", "train", config="ca")["transcription"][:] == ["un"]
