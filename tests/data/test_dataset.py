import logging
import os

import numpy as np
import pytest
import torch
from helpers import noise
from transformers import WhisperFeatureExtractor, WhisperProcessor

datasets = pytest.importorskip("datasets")
soundfile = pytest.importorskip("soundfile")

from peft_clsr import encode_labels, prepare_dataset


@pytest.fixture
def processor(tiny_processor):
    """5 s of context."""
    return WhisperProcessor(WhisperFeatureExtractor(chunk_length=5), tiny_processor.tokenizer)


def ids(tokenizer, *tokens):
    return tokenizer.convert_tokens_to_ids(list(tokens))


@pytest.fixture
def recordings(tmp_path):
    """A dataset with one item of each kind, good ones at 0 and 6."""
    soundfile.write(tmp_path / "good.wav", noise(2.0), 16000)
    soundfile.write(tmp_path / "long.wav", noise(10.0), 16000)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, dtype=np.float32), 16000)
    (tmp_path / "broken.wav").write_text("not audio")
    soundfile.write(tmp_path / "wordy.wav", noise(1.0), 16000)
    soundfile.write(tmp_path / "silent.wav", noise(1.0), 16000)
    soundfile.write(tmp_path / "other.ogg", noise(1.0, 44100), 44100)
    names = ["good.wav", "long.wav", "empty.wav", "broken.wav", "wordy.wav", "silent.wav", "other.ogg"]
    texts = ["un peix", "llarg", "res", "res", "x" * 445, " ", "una flor"]
    return datasets.Dataset.from_dict(
        {"audio": [str(tmp_path / name) for name in names], "transcription": texts}
    ).cast_column("audio", datasets.Audio())


def test_labels_are_language_task_no_timestamps_text_and_end(tiny_processor):
    tokenizer = tiny_processor.tokenizer
    labels = encode_labels(tokenizer, "ab", "catalan")
    space = tokenizer.convert_tokens_to_ids("Ġ")
    assert labels == [
        *ids(tokenizer, "<|ca|>", "<|transcribe|>", "<|notimestamps|>"),
        space,
        *ids(tokenizer, "a", "b", "<|endoftext|>"),
    ]
    assert encode_labels(tokenizer, "  ab ", "ca") == labels
    translate = encode_labels(tokenizer, "ab", "ca", "translate")
    assert translate[1] == tokenizer.convert_tokens_to_ids("<|translate|>")


def test_labels_of_a_language_that_the_tokenizer_lacks_are_refused(tiny_processor):
    with pytest.raises(ValueError, match=r"no token <\|de\|>"):
        encode_labels(tiny_processor.tokenizer, "ab", "german")
    with pytest.raises(ValueError, match="catalann"):
        encode_labels(tiny_processor.tokenizer, "ab", "catalann")
    with pytest.raises(ValueError, match="'translat' is unknown"):
        encode_labels(tiny_processor.tokenizer, "ab", "ca", "translat")


def test_bad_items_are_dropped_named_and_counted(recordings, processor, caplog):
    with caplog.at_level(logging.WARNING):
        prepared, counts = prepare_dataset(recordings, processor, "catalan")
    assert counts == {
        "kept": 2,
        "unreadable": 1,
        "empty": 1,
        "too_long": 1,
        "cut": 0,
        "labels_too_long": 1,
        "no_text": 1,
        "special_tokens": 0,
        "unknown_language": 0,
    }
    assert prepared.column_names == ["input_features", "attention_mask", "labels", "text", "language", "index"]
    assert prepared["text"][:] == ["un peix", "una flor"]
    assert prepared["language"][:] == ["ca", "ca"]
    for name in ("long.wav", "empty.wav", "broken.wav", "wordy.wav", "silent.wav"):
        assert sum(name in message for message in caplog.messages) == 1
    assert not any("good.wav" in message for message in caplog.messages)


def test_features_are_those_of_the_extractor_and_the_mask_covers_the_audio(recordings, processor):
    prepared, _ = prepare_dataset(recordings, processor, "ca")
    item = prepared[0]
    samples, _ = soundfile.read(recordings.cast_column("audio", datasets.Audio(decode=False))[0]["audio"]["path"])
    expected = processor.feature_extractor(samples.astype(np.float32), sampling_rate=16000, return_tensors="pt")
    assert item["input_features"].dtype == torch.float32
    assert torch.equal(item["input_features"], expected.input_features[0])
    assert item["input_features"].shape == (80, 500)
    assert item["attention_mask"].sum() == 200  # 2 s of frames of 10 ms
    assert item["attention_mask"][:200].all()
    assert prepared[1]["attention_mask"].sum() == 100
    assert item["labels"].tolist() == encode_labels(processor.tokenizer, "un peix", "ca")


def test_long_audio_is_cut_on_request_and_counted(recordings, processor, caplog):
    with caplog.at_level(logging.WARNING):
        prepared, counts = prepare_dataset(recordings, processor, "ca", long_audio="cut")
    assert (counts["kept"], counts["cut"], counts["too_long"]) == (3, 1, 0)
    assert prepared[1]["text"] == "llarg"
    assert prepared[1]["attention_mask"].sum() == 500
    assert any("long.wav: 10.0 s of audio" in message for message in caplog.messages)


def test_paths_and_arrays_are_audio_columns_too(processor, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(1.0), 16000, subtype="FLOAT")
    paths = datasets.Dataset.from_dict({"file": [str(tmp_path / "a.wav")], "text": ["a"], "language": ["x"]})
    arrays = datasets.Dataset.from_dict({"file": [{"array": noise(1.0), "sampling_rate": 16000}], "text": ["a"]})
    columns = {"audio_column": "file", "text_column": "text"}
    from_path, _ = prepare_dataset(paths, processor, "ro", **columns)
    from_array, _ = prepare_dataset(arrays, processor, "ro", **columns)
    assert torch.equal(from_path[0]["input_features"], from_array[0]["input_features"])
    assert from_path[0]["language"] == "ro"


def test_a_dataset_with_nothing_left_or_without_the_column_is_refused(recordings, processor):
    with pytest.raises(ValueError, match=r"no item of the 1 .*1 unreadable"):
        prepare_dataset(recordings.select([3]), processor, "ca")
    with pytest.raises(ValueError, match=r"no column 'sentence'; it has 'audio', 'transcription'.*--text_column"):
        prepare_dataset(recordings, processor, "ca", text_column="sentence")
    with pytest.raises(ValueError, match="'chop' is unknown"):
        prepare_dataset(recordings, processor, "ca", long_audio="chop")


def test_rows_of_several_languages_are_labelled_by_their_own(recordings, processor, caplog):
    rows = recordings.select([0, 6, 0, 6, 0]).add_column("language", ["Catalan", "ro", "catalann", "german", None])
    with caplog.at_level(logging.WARNING):
        prepared, counts = prepare_dataset(rows, processor)
    assert (counts["kept"], counts["unknown_language"]) == (2, 3)
    assert prepared["language"][:] == ["ca", "ro"]
    assert prepared["index"][:].tolist() == [0, 1]
    for row, text, language in ((0, "un peix", "ca"), (1, "una flor", "ro")):
        assert prepared[row]["labels"].tolist() == encode_labels(processor.tokenizer, text, language)
    for index, reason in ((2, "'catalann' is neither"), (3, r"no token <|de|>"), (4, "None is neither")):
        (message,) = [message for message in caplog.messages if f"item {index}," in message]
        assert message.startswith("dropped") and reason in message

    renamed, _ = prepare_dataset(rows.rename_column("language", "spoken"), processor, language_column="spoken")
    assert renamed["language"][:] == ["ca", "ro"]
    all_of_one, counts = prepare_dataset(rows, processor, "ca")
    assert all_of_one["language"][:] == ["ca"] * 5 and counts["unknown_language"] == 0


def test_a_dataset_without_a_language_is_refused(recordings, processor):
    with pytest.raises(ValueError, match=r"no column 'language'; it has .*give a language .* or set language_column"):
        prepare_dataset(recordings, processor)
    numbered = recordings.add_column("language", range(7))
    with pytest.raises(ValueError, match="column 'language' holds int64; expected text"):
        prepare_dataset(numbered, processor)


def test_an_empty_split_is_refused_by_name(recordings, processor, tmp_path):
    with pytest.raises(ValueError, match="the dataset is empty: "):
        prepare_dataset(datasets.Dataset.from_dict({}), processor, "ca")
    named = datasets.Dataset.from_dict({"audio": [], "transcription": []}, split="validation")
    with pytest.raises(ValueError, match=r"the dataset is empty \(split 'validation'\)"):
        prepare_dataset(named, processor, "ca")


def test_a_column_of_numbers_is_no_text(tiny_processor):
    dataset = datasets.Dataset.from_dict({"audio": ["a.wav"], "transcription": [7]})
    with pytest.raises(ValueError, match="'transcription' holds int64"):
        prepare_dataset(dataset, tiny_processor, "ca")


# ---------------------------------------------------------------- special tokens, limits, unusable rows


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("<|0.00|> unu<|0.50|>", r"<\|0\.00\|>, <\|0\.50\|>"),
        ("<|startoftranscript|><|ro|> unu", r"<\|startoftranscript\|>, <\|ro\|>"),
        ("unu <|endoftext|> doi", r"token <\|endoftext\|>, expected words"),
        ("unu [hesitation] doi", r"token \[hesitation\], expected words"),
    ],
)
def test_special_tokens_in_a_transcript_are_refused(tiny_processor, text, named):
    tokenizer = tiny_processor.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["[hesitation]"]})
    with pytest.raises(ValueError, match=f"the transcript '.*unu.*' holds .*{named}.*remove them"):
        encode_labels(tokenizer, text, "ro")


def test_angle_brackets_and_bars_are_text(tiny_processor):
    for text in ("a < b | c > d", "<a> |b|", "< | a | >"):
        labels = encode_labels(tiny_processor.tokenizer, text, "ro")
        assert tiny_processor.tokenizer.decode(labels[3:-1]) == " " + text


def test_items_with_special_tokens_are_dropped_named_and_counted(recordings, processor, caplog):
    rows = recordings.select([0, 6]).remove_columns("transcription")
    rows = rows.add_column("transcription", ["un peix", "<|0.00|> una flor<|0.50|>"])
    prepared, counts = prepare_dataset(rows, processor, "ca")
    assert (counts["kept"], counts["special_tokens"], counts["unknown_language"]) == (1, 1, 0)
    assert prepared["text"][:] == ["un peix"]
    (message,) = [message for message in caplog.messages if "other.ogg" in message]
    assert message.startswith("dropped: item 1,") and "<|0.00|>, <|0.50|>" in message


def test_the_limit_of_labels_is_an_argument(recordings, processor):
    length = len(encode_labels(processor.tokenizer, "una flor", "ca"))
    for limit, kept in ((length, 2), (length - 1, 1)):
        _, counts = prepare_dataset(recordings.select([0, 6]), processor, "ca", max_label_length=limit)
        assert (counts["kept"], counts["labels_too_long"]) == (kept, 2 - kept)


def test_more_dropped_items_than_allowed_stop_before_any_audio_is_decoded(recordings, processor, monkeypatch, caplog):
    monkeypatch.setattr("peft_clsr.data.rows.read_audio", lambda *args: pytest.fail("audio was decoded"))
    with pytest.raises(ValueError, match=r"5 of 7 items cannot be used \(.*\), more than 50% .*long\.wav") as error:
        prepare_dataset(recordings, processor, "ca", max_dropped=0.5)
    for part in (
        "1 unreadable",
        "1 empty",
        "1 too_long",
        "1 labels_too_long",
        "1 no_text",
        "set a larger max_dropped",
    ):
        assert part in str(error.value)
    assert any("2 of 7 items can be used" in message for message in caplog.messages)
    monkeypatch.undo()
    assert prepare_dataset(recordings, processor, "ca", max_dropped=5 / 7)[1]["kept"] == 2
    with pytest.raises(ValueError, match="max_dropped is 10, expected a share"):
        prepare_dataset(recordings, processor, "ca", max_dropped=10)


def test_items_that_only_decoding_shows_to_be_bad_count_too(recordings, processor, tmp_path, caplog):
    path = tmp_path / "cut.flac"
    soundfile.write(path, noise(2.0), 16000)
    path.write_bytes(path.read_bytes()[:30000])
    rows = datasets.Dataset.from_dict({"audio": [str(path), str(tmp_path / "good.wav")], "transcription": ["a", "b"]})
    assert prepare_dataset(rows, processor, "ca")[1]["unreadable"] == 1
    assert sum("cut.flac" in message for message in caplog.messages) == 1
    with pytest.raises(ValueError, match=r"1 of 2 items cannot be used \(1 unreadable\).*cut\.flac"):
        prepare_dataset(rows, processor, "ca", max_dropped=0.1)


# ---------------------------------------------------------------- audio files that change, and integer samples


@pytest.fixture
def cached(processor, tmp_path, monkeypatch):
    """Prepares the rows of a table of a.wav and b.wav, as a new run does, with the cache of earlier ones."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "table.csv").write_text(f"audio,transcription\n{tmp_path}/a.wav,unu\n{tmp_path}/b.wav,doi\n")
    soundfile.write(tmp_path / "a.wav", noise(1.0, seed=1), 16000)

    def prepare():
        rows = datasets.load_dataset("csv", data_files=str(tmp_path / "table.csv"), split="train")
        return prepare_dataset(rows, processor, "ro")

    return prepare


def test_features_are_computed_once(cached, monkeypatch):
    first = cached()[0]
    monkeypatch.setattr("peft_clsr.data.rows.read_audio", lambda *args: pytest.fail("features were computed again"))
    assert torch.equal(cached()[0][0]["input_features"], first[0]["input_features"])


def test_a_file_that_was_missing_and_is_there_is_read(cached, tmp_path):
    assert cached()[1]["kept"] == 1
    soundfile.write(tmp_path / "b.wav", noise(1.0, seed=2), 16000)
    assert cached()[1]["kept"] == 2


@pytest.mark.parametrize("way", ["write", "move", "link"])
def test_a_file_that_was_replaced_by_one_of_the_same_size_is_read_again(cached, processor, tmp_path, way):
    before = cached()[0][0]["input_features"]
    old = os.stat(tmp_path / "a.wav")
    new = tmp_path / ("a.wav" if way == "write" else "new.wav")
    soundfile.write(new, noise(1.0, seed=2), 16000)
    assert new.stat().st_size == old.st_size
    if way == "move":  # as archives unpack them, with the same time
        os.utime(new, ns=(old.st_atime_ns, old.st_mtime_ns))
        new.replace(tmp_path / "a.wav")
    elif way == "link":
        (tmp_path / "a.wav").unlink()
        (tmp_path / "a.wav").symlink_to(new)
    after = cached()[0][0]["input_features"]
    samples, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    expected = processor.feature_extractor(samples, sampling_rate=16000, return_tensors="pt").input_features[0]
    assert torch.equal(after, expected) and not torch.equal(after, before)


def test_rows_that_hold_their_audio_have_no_files(processor, tmp_path):
    from peft_clsr.data.rows import files_digest

    soundfile.write(tmp_path / "a.wav", noise(1.0), 16000)
    content = (tmp_path / "a.wav").read_bytes()
    cells = [{"bytes": content, "path": str(tmp_path / "a.wav")}, {"bytes": None, "path": str(tmp_path / "b.wav")}]
    rows = datasets.Dataset.from_dict({"audio": cells}).cast_column("audio", datasets.Audio(decode=False))
    digests = [files_digest(rows, "audio")]
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, noise(2.0), 16000)
        digests.append(files_digest(rows, "audio"))
    assert digests[0] == digests[1] != digests[2]
    assert files_digest(rows.select([1, 0]), "audio") != digests[2]


def test_integer_arrays_of_a_dataset_are_scaled(processor):
    samples = noise(1.0)
    features = []
    for array in (samples, np.round(samples * 32768).astype(np.int16)):
        rows = datasets.Dataset.from_dict(
            {"audio": [{"array": array, "sampling_rate": 16000}], "transcription": ["a"]}
        )
        features.append(prepare_dataset(rows, processor, "ro")[0][0]["input_features"])
    torch.testing.assert_close(features[0], features[1], atol=0.01, rtol=0)
    rows = datasets.Dataset.from_dict(
        {"audio": [{"array": [0, 20000, -300], "sampling_rate": 16000}], "transcription": ["a"]}
    )
    with pytest.raises(ValueError, match="type int64"):
        prepare_dataset(rows, processor, "ro")
