"""Packed utterances: rows of a window, epochs, streams, and what is left out."""

import datasets
import numpy as np
import pytest
from helpers import noise
from torch.utils.data import DataLoader

from peft_clsr import PackedStream, encode_labels, pack_utterances

TEXTS = ["unu", "doi", "trei", "patru", "cinci", "sase"]


@pytest.fixture
def processor(tiny_processor):
    """At 3 s, with timestamps."""
    extractor = tiny_processor.feature_extractor
    extractor.chunk_length, extractor.n_samples, extractor.nb_max_frames = 3, 48000, 300
    tiny_processor.tokenizer.add_tokens([f"<|{0.02 * step:.2f}|>" for step in range(151)])
    return tiny_processor


def recordings(number=24, seconds=0.4, **columns):
    rows = [
        {
            "audio": {"array": noise(seconds, seed=index), "sampling_rate": 16000},
            "transcription": f"{TEXTS[index % 6]} {index}",
        }
        for index in range(number)
    ]
    return datasets.Dataset.from_list(
        [{**row, **{name: values[index] for name, values in columns.items()}} for index, row in enumerate(rows)]
    )


def pack(dataset, processor, language="ro", **arguments):
    return pack_utterances(dataset, processor, language, max_seconds=3.0, **arguments)


def words(rows):
    return sorted(" ".join(row["text"] for row in rows).split())


def test_rows_are_like_those_of_prepare_dataset(processor):
    packed = pack(recordings(), processor, timestamps=0, previous_text=0)
    row = packed[0]
    assert row["input_features"].shape == (80, 300) and row["attention_mask"].shape == (300,)
    assert row["labels"] == encode_labels(processor.tokenizer, row["text"], "ro")
    assert (row["language"], row["index"]) == ("ro", 0)
    assert packed.counts["kept"] == 24 and packed.seconds == pytest.approx(9.6)
    assert packed.languages == ["ro"] * len(packed)


def test_every_text_is_there_once_an_epoch_and_windows_change(processor):
    packed = pack(recordings(), processor)
    spoken = words(recordings().rename_column("transcription", "text"))
    seen = []
    for epoch in range(3):
        packed.set_epoch(epoch)
        rows = list(packed)
        assert len(rows) == len(packed) < 24
        assert words(rows) == spoken
        seen.append([row["text"] for row in rows])
    assert seen[0] != seen[1] != seen[2]
    packed.set_epoch(0)
    assert [row["text"] for row in packed] == seen[0]


def test_timestamps_are_where_the_speech_is(processor):
    packed = pack(recordings(), processor, timestamps=1, previous_text=0)
    for row in packed:
        tokens = processor.tokenizer.convert_ids_to_tokens(row["labels"])
        assert tokens[:2] == ["<|ro|>", "<|transcribe|>"] and tokens[-1] == "<|endoftext|>"
        times = [float(token[2:-2]) for token in tokens if token[2:3].isdigit()]
        assert len(times) == 2 * len(row["text"].split()) // 2
        starts, ends = times[::2], times[1::2]
        energy = row["input_features"].mean(0)
        heard = energy > (energy.min() + energy.max()) / 2
        for start, end in zip(starts, ends, strict=True):
            assert end - start == pytest.approx(0.4, abs=0.021)
            assert heard[round(100 * start) + 3 : round(100 * end) - 3].all()
        for end, start in zip(ends, starts[1:], strict=False):
            assert 0.08 <= start - end <= 0.62
            assert not heard[round(100 * end) + 3 : round(100 * start) - 3].any()


@pytest.mark.parametrize("prompt_language", ["ca", {"rw": "ca"}])
def test_a_language_that_whisper_does_not_know_has_another_ones_token(processor, prompt_language):
    for row in pack(recordings(), processor, "rw", prompt_language=prompt_language):
        assert row["language"] == "rw"
        assert processor.tokenizer.convert_ids_to_tokens(row["labels"][:2]) == ["<|ca|>", "<|transcribe|>"]
    with pytest.raises(ValueError, match="Whisper has no language 'rw': name the Whisper language"):
        pack(recordings(), processor, "rw")


def test_a_prompt_is_the_text_before(processor):
    packed = pack(recordings(), processor, previous_text=1, single=0)
    rows = list(packed)
    for index, row in enumerate(rows):
        tokenizer = processor.tokenizer
        assert tokenizer.convert_ids_to_tokens(row["prompt_ids"][0]) == "<|startofprev|>"
        assert tokenizer.decode(row["prompt_ids"][1:]).strip() == rows[index - 1]["text"]
    share = np.mean(["prompt_ids" in row for row in pack(recordings(96), processor, previous_text=0.5)])
    assert 0.2 < share < 0.8


def test_prompt_and_labels_fit_into_the_decoder(processor):
    for row in pack(recordings(), processor, previous_text=1, max_label_length=50):
        assert len(row["labels"]) + len(row.get("prompt_ids", [])) <= 50


def test_windows_have_one_language_and_one_speaker(processor):
    dataset = recordings(language=["ro", "ca", "fr"] * 8, speaker=[1, 1, 1, 2, 2, 2] * 4)
    packed = pack_utterances(dataset, processor, max_seconds=3, speaker_column="speaker", previous_text=1)
    whose = {text: (row["language"], row["speaker"]) for row in dataset for text in [row["transcription"]]}
    rows = list(packed)
    assert [row["language"] for row in rows] == packed.languages
    for row in rows:
        spoken = row["text"].split()
        assert len({whose[" ".join(spoken[start : start + 2])] for start in range(0, len(spoken), 2)}) == 1


def test_what_cannot_be_used_is_counted_and_named(processor, caplog, tmp_path):
    dataset = datasets.Dataset.from_list(
        [
            {"audio": {"array": noise(0.4), "sampling_rate": 16000}, "transcription": "unu"},
            {"audio": {"array": noise(0.4), "sampling_rate": 16000}, "transcription": " "},
            {"audio": {"array": noise(3.05), "sampling_rate": 16000}, "transcription": "doi"},
            {"audio": {"array": noise(0.4), "sampling_rate": 16000}, "transcription": "x" * 500},
        ]
    )
    packed = pack(dataset, processor)
    counts = {name: count for name, count in packed.counts.items() if count}
    assert counts == {"kept": 1, "no_text": 1, "too_long": 1, "labels_too_long": 1}
    assert "item 2" in caplog.text and "longer than a window of 3 s" in caplog.text
    with pytest.raises(ValueError, match="no row of the 1 in the dataset can be used .1 no_text"):
        pack(dataset.select([1]), processor)


# ---------------------------------------------------------------- without speech


def silent_rows(packed):
    return [row for row in packed if not row["text"]]


def test_a_share_of_windows_has_no_speech_and_empty_labels(processor):
    packed = pack(recordings(96), processor, no_speech=0.25, timestamps=0.5)
    rows = list(packed)
    silent = silent_rows(rows)
    assert len(rows) == len(packed) == len(packed.languages) and packed[-1]["text"] == ""
    assert len(silent) / len(rows) == pytest.approx(0.25, abs=0.02)
    assert words(rows) == words(recordings(96).rename_column("transcription", "text"))
    labels = {tuple(processor.tokenizer.convert_ids_to_tokens(row["labels"])) for row in silent}
    assert labels == {
        ("<|ro|>", "<|transcribe|>", "<|notimestamps|>", "<|endoftext|>"),
        ("<|ro|>", "<|transcribe|>", "<|0.00|>", "<|endoftext|>"),
    }
    assert [row["index"] for row in rows] == list(range(len(rows)))


def test_generated_silence_and_noise_differ_in_each_window_and_epoch(processor):
    packed = pack(recordings(), processor, no_speech=0.5)
    first = [row["input_features"].tobytes() for row in silent_rows(packed)]
    packed.set_epoch(1)
    second = [row["input_features"].tobytes() for row in silent_rows(packed)]
    assert len(first) == len(second) and len({*first, *second}) > len(first)
    packed.set_epoch(0)
    assert [row["input_features"].tobytes() for row in silent_rows(packed)] == first


def test_rows_without_text_are_heard_in_turn_as_windows_without_speech(processor, caplog):
    """Each is one frequency, which tells them apart; the last is longer than a window."""
    tones = {500: 0.5, 1500: 1.0, 3000: 7.0}
    clips = [
        {"array": np.sin(tone * np.arange(round(seconds * 16000), dtype=np.float32) / 2546), "sampling_rate": 16000}
        for tone, seconds in tones.items()
    ]
    silent = datasets.Dataset.from_list([{"audio": clip, "transcription": ""} for clip in clips])
    dataset = datasets.concatenate_datasets([recordings(), silent])
    with caplog.at_level("INFO"):
        packed = pack(dataset, processor, no_speech=0.3)
    assert "3 rows have no text: they are heard as recordings without speech" in caplog.text
    assert packed.counts["kept"] == 27 and packed.counts["no_text"] == packed.counts["too_long"] == 0
    heard = []
    for epoch in range(3):
        packed.set_epoch(epoch)
        for row in silent_rows(packed):
            heard.append((int(row["input_features"].mean(1).argmax()), int(row["attention_mask"].sum())))
    counts = [heard.count(one) for one in sorted(set(heard))]
    assert len(counts) == 3 and max(counts) - min(counts) <= 1
    assert sorted(frames for _, frames in set(heard)) == [50, 100, 300]
    assert pack(dataset, processor).counts["no_text"] == 3


def test_each_language_has_its_share_without_speech(processor):
    dataset = recordings(96, language=["ro", "ro", "ca"] * 32)
    packed = pack_utterances(dataset, processor, max_seconds=3, no_speech=0.5)
    assert packed.languages.count("ro") == 2 * sum(row["language"] == "ro" for row in silent_rows(packed))
    assert packed.languages.count("ca") == 2 * sum(row["language"] == "ca" for row in silent_rows(packed))


@pytest.mark.parametrize("kind", ["dataset", "stream"])
def test_each_language_has_a_window_without_speech_however_small_the_share(processor, kind):
    dataset = recordings(24, language=["ro", "ro", "ca"] * 8)
    if kind == "stream":
        dataset = dataset.to_iterable_dataset()
    for share, number in ((0.05, 1), (0, 0)):
        packed = pack_utterances(dataset, processor, max_seconds=3, no_speech=share)
        assert sorted(row["language"] for row in silent_rows(packed)) == ["ca", "ro"] * number


def test_the_share_without_speech_is_that_of_the_whole_stream(processor, monkeypatch):
    monkeypatch.setattr("peft_clsr.data.packing._BUFFER", 12)  # of which no share is half a window
    rows = list(pack(recordings(240).to_iterable_dataset(), processor, no_speech=0.05))
    assert len(silent_rows(rows)) / len(rows) == pytest.approx(0.05, abs=0.01)


def test_a_stream_has_windows_without_speech_too(processor):
    rows = list(pack(recordings(48).to_iterable_dataset(), processor, no_speech=0.25))
    assert len(silent_rows(rows)) / len(rows) == pytest.approx(0.25, abs=0.05)


def test_workers_that_outlive_an_epoch_draw_new_windows(processor):
    packed = pack(recordings(), processor)
    loader = DataLoader(packed, batch_size=None, num_workers=2, persistent_workers=True)
    texts = []
    for epoch in range(2):
        packed.set_epoch(epoch)
        texts.append([row["text"] for row in loader])
        assert texts[-1] == [row["text"] for row in packed]
    assert texts[0] != texts[1]


def test_a_stream_is_packed_too(processor):
    packed = pack(recordings().to_iterable_dataset(), processor)
    assert isinstance(packed, PackedStream)
    first = list(packed)
    assert words(first) == words(recordings().rename_column("transcription", "text")) and len(first) < 24
    packed.set_epoch(1)
    assert [row["text"] for row in packed] != [row["text"] for row in first]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"max_seconds": 3.5}, "max_seconds is 3.5; expected more than 0, and at most the context of 3 s"),
        ({"timestamps": 1.5}, "timestamps is 1.5; expected a share"),
        ({"single": -1}, "single is -1; expected a share"),
        ({"no_speech": 1}, "no_speech is 1; expected a share of windows from 0 to less than 1"),
        ({"speaker_column": "who"}, "no column 'who'"),
        ({"text_column": "text"}, "no column 'text'"),
    ],
)
def test_bad_arguments_are_named(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        pack_utterances(recordings(2), processor, "ro", **{"max_seconds": 3, **arguments})


def test_a_tokenizer_without_timestamps_is_refused(tiny_processor):
    with pytest.raises(ValueError, match="no token"):
        pack_utterances(recordings(4, 0.2), tiny_processor, "ro", max_seconds=1, timestamps=0.01)
