"""Rows that are parts of recordings: their times, what is refused, and `prepare_dataset`."""

import datasets
import numpy as np
import pytest
import soundfile
from helpers import noise, write_container

from peft_clsr import DataCollatorSpeechSeq2SeqWithPadding, prepare_dataset
from peft_clsr.data.audio import read_audio
from peft_clsr.data.segments import BadSegment, Segment, find_segments, parse_time
from peft_clsr.data.table_reader import log_once


def find(*times, seconds=60.0, audio="talk.wav"):
    rows = [{"audio": audio, "start": start, "end": end} for start, end in times]
    return find_segments(enumerate(rows), "audio", lambda row: seconds)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(12.5, 12.5), (3, 3), ("12.5", 12.5), (" 12,5 ", 12.5), ("01:02.5", 62.5), ("1:00:02,500", 3602.5), ("0", 0)],
)
def test_times_are_seconds_or_those_of_a_clock(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["soon", "1:2:3:4", "nan", "-1", float("inf"), "", None, "1:xx"])
def test_what_is_no_time_is_named(text):
    with pytest.raises(ValueError, match="is no time: expected seconds"):
        parse_time(text)


def test_segments_know_the_one_before_and_the_pause():
    found = find((5, 6), ("0", "2"), (2.5, 4))
    assert found == {1: Segment(0, 2, None, 0), 2: Segment(2.5, 4, 1, 0.5), 0: Segment(5, 6, 2, 1)}


def test_small_errors_of_hand_made_times_are_mended():
    found = find((0, 2.1), (2, 4), (4, 60.9))
    assert [segment[:2] for segment in found.values()] == [(0, 2), (2, 4)] + [(4, 60)]


def test_rows_without_times_are_whole_recordings():
    assert find((None, None), ("", ""), (1, 2)) == {2: Segment(1, 2, None, 1)}


@pytest.mark.parametrize(
    ("times", "outcomes", "problem"),
    [
        ([(3, 2)], ["bad_times"], "it ends at 2.00 s, not after its start at 3.00 s"),
        ([(2, 2)], ["bad_times"], "not after its start"),
        ([("x", 2)], ["bad_times"], "'x' is no time"),
        ([(1, None)], ["bad_times"], "None is no time"),
        ([(60, 61)], ["beyond_audio"], "the recording has only 60.00 s"),
        ([(58, 61.1)], ["beyond_audio"], "the recording has only 60.00 s"),
        ([(0, 3), (2, 5)], ["overlap", "overlap"], "it overlaps item 1, 2.00 to 5.00 s"),
        ([(0, 5), (1, 1.2)], ["overlap", "overlap"], "it overlaps item 1, 1.00 to 1.20 s"),
    ],
)
def test_what_cannot_be_used_is_refused(times, outcomes, problem):
    found = find(*times, (20, 22))
    assert [found[number].outcome for number in range(len(times))] == outcomes and problem in found[0].problem
    assert found[len(times)][:2] == (20, 22)


def test_nothing_is_heard_across_a_refused_row():
    found = find((0, 2), (9, 8), (3, 4), (5, 7), (6, 9), (10, 11))
    assert isinstance(found[1], BadSegment) and found[2] == Segment(3, 4)
    assert found[5] == Segment(10, 11, 4, 1)  # row 4 overlaps, so nothing follows it


def test_a_credit_over_the_whole_film_refuses_nothing_else():
    found = find((0, 50), (1, 3), (4, 6))
    assert found[1][:2] == (1, 3) and found[2] == Segment(4, 6, 1, 1)


# ------------------------------------------------------------------ parts of files


@pytest.mark.parametrize(
    ("name", "tolerance"), [("a.wav", 0), ("a.flac", 0), ("a.mp3", 1e-4), ("a.ogg", 1e-4), ("a.opus", 1e-4)]
)
def test_a_part_is_that_of_the_whole_file(tmp_path, capfd, name, tolerance):
    path = tmp_path / name
    kind = {"format": "OGG", "subtype": "OPUS"} if name == "a.opus" else {}
    soundfile.write(path, noise(4.0), 16000, **kind)
    whole = read_audio(path)
    for start, end in [(0, 1), (1.2345, 2.5), (3.5, None)]:
        part = read_audio(path, 16000, start, end)
        expected = whole[round(16000 * start) : None if end is None else round(16000 * end)]
        np.testing.assert_allclose(part, expected, atol=tolerance)
    assert capfd.readouterr().err == ""  # mpg123 speaks of frames that are not used


@pytest.mark.parametrize(("name", "codec", "seeks"), [("a.m4a", "aac", True), ("a.aac", "aac", False)])
def test_a_part_of_a_container_is_that_of_the_whole_file(tmp_path, caplog, name, codec, seeks):
    log_once.cache_clear()
    path = tmp_path / name
    write_container(path, noise(4.0), 16000, codec)
    whole = read_audio(path)
    for start, end in [(0, 1), (2.25, 3.0)]:
        np.testing.assert_array_equal(
            read_audio(path, 16000, start, end), whole[round(16000 * start) : round(16000 * end)]
        )
    assert ("without exact seeking" in caplog.text) is not seeks


def test_only_the_part_is_decoded(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "talk.flac", noise(60.0), 16000)
    read, frames = soundfile.SoundFile.read, []
    monkeypatch.setattr(
        soundfile.SoundFile,
        "read",
        lambda self, number=-1, **kind: frames.append(number) or read(self, number, **kind),
    )
    assert len(read_audio(tmp_path / "talk.flac", 8000, 50.0, 51.5)) == 12000
    assert frames == [24000]


# ------------------------------------------------------------------ prepare_dataset


def test_prepare_dataset_cuts_each_row_from_its_recording(tmp_path, tiny_processor, caplog):
    talk = tmp_path / "talk.wav"
    soundfile.write(talk, noise(3.0), 16000)
    rows = [(0.0, 0.5, "un"), (1.0, 1.8, "dos"), (2.0, 1.9, "tres"), (1.9, 3.5, "long"), (7.0, 8.0, "far")]
    dataset = datasets.Dataset.from_list(
        [{"audio": str(talk), "start": start, "end": end, "text": text} for start, end, text in rows]
    )
    prepared, counts = prepare_dataset(dataset, tiny_processor, "ca")
    assert prepared["text"][:] == ["un", "dos"] and prepared["attention_mask"][:].sum(1).tolist() == [50, 80]
    extractor = tiny_processor.feature_extractor
    expected = extractor(read_audio(talk, 16000, 1.0, 1.8), sampling_rate=16000, return_tensors="np").input_features[0]
    np.testing.assert_array_equal(prepared["input_features"][1].numpy(), expected)
    again, _ = prepare_dataset(dataset, tiny_processor, "ca")
    assert again.cache_files == prepared.cache_files  # nothing is computed twice
    counts = {name: count for name, count in counts.items() if count}
    assert counts == {"kept": 2, "bad_times": 1, "too_long": 1, "beyond_audio": 1}
    assert f"item 2, {talk}, 2.0 to 1.9: it ends at 1.90 s, not after its start" in caplog.text


def test_one_column_of_times_alone_is_said(tmp_path, tiny_processor, caplog):
    log_once.cache_clear()
    soundfile.write(tmp_path / "a.wav", noise(0.5), 16000)
    dataset = datasets.Dataset.from_list([{"audio": str(tmp_path / "a.wav"), "start": 0.1, "transcription": "un"}])
    prepared, _ = prepare_dataset(dataset, tiny_processor, "ca")
    assert prepared["attention_mask"][:].sum() == 50 and "has a column 'start' alone" in caplog.text


def test_the_collator_cuts_raw_rows_too(tmp_path, tiny_processor):
    soundfile.write(tmp_path / "talk.wav", noise(3.0), 16000)
    row = {"audio": tmp_path / "talk.wav", "start": "2.0", "end": "2.3", "text": "un"}
    collator = DataCollatorSpeechSeq2SeqWithPadding(tiny_processor, language="ca")
    assert collator([row])["attention_mask"].sum() == 30
    with pytest.raises(ValueError, match="talk.wav: it ends at 1.00 s"):
        collator([{**row, "end": 1}])
