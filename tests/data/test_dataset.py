import logging

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
    for index, reason in ((2, "'catalann' is not"), (3, r"no token <|de|>"), (4, "None is not")):
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
