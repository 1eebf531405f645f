"""Windows of long recordings: segments in their order, real audio between them, and open starts."""

import datasets
import numpy as np
import pytest
import soundfile

from peft_clsr import PackedStream, pack_utterances
from peft_clsr.data.audio import read_audio
from peft_clsr.data.labels import encode_segments
from peft_clsr.data.windows import WindowPlan

WORDS = ["unu", "doi", "trei", "patru", "cinci", "sase", "sapte", "opt", "noua", "zece", "unspe", "doispe"]


@pytest.fixture
def processor(tiny_processor):
    """At 3 s, with timestamps."""
    extractor = tiny_processor.feature_extractor
    extractor.chunk_length, extractor.n_samples, extractor.nb_max_frames = 3, 48000, 300
    tiny_processor.tokenizer.add_tokens([f"<|{0.02 * step:.2f}|>" for step in range(151)])
    return tiny_processor


def talk(folder, name="talk.wav", times=None, **columns):
    """
    A recording with a tone of its own height in each segment, and a soft one between.

    By default: 12 segments of 0.5 s with pauses of 0.2 s, from 0.3 s on.
    """
    times = [(0.3 + 0.7 * k, 0.8 + 0.7 * k) for k in range(12)] if times is None else times
    length = max(end for _, end in times) + 0.4
    clock = np.arange(round(length * 16000)) / 16000
    samples = 0.02 * np.sin(2 * np.pi * 3000 * clock)
    for number, (start, end) in enumerate(times):
        inside = (clock >= start) & (clock < end)
        samples[inside] = 0.4 * np.sin(2 * np.pi * (300 + 100 * number) * clock[inside])
    soundfile.write(folder / name, samples.astype(np.float32), 16000, subtype="FLOAT")
    return [
        {"audio": str(folder / name), "start": start, "end": end, "transcription": word, **columns}
        for (start, end), word in zip(times, WORDS, strict=False)
    ]


def pack(rows, processor, **arguments):
    dataset = datasets.Dataset.from_list(rows)
    return pack_utterances(dataset, processor, "ro", max_seconds=3.0, **{"previous_text": 0, "single": 0, **arguments})


def timestamps(row, processor):
    tokens = processor.tokenizer.convert_ids_to_tokens(row["labels"])
    return [float(token[2:-2]) for token in tokens if token[2:3].isdigit()]


@pytest.fixture
def windows(monkeypatch):
    """The samples of each window that is taken, as the features are computed from them."""
    from peft_clsr.data import window_rows

    taken, compute = [], window_rows.example_features
    monkeypatch.setattr(
        window_rows, "example_features", lambda samples, *rest: taken.append(samples) or compute(samples, *rest)
    )
    return taken


def test_each_segment_is_in_one_window_in_the_order_of_speech(processor, tmp_path):
    rows = talk(tmp_path)
    packed = pack(rows[6:] + rows[:6], processor)  # in any order
    follow = []
    for epoch in range(4):
        packed.set_epoch(epoch)
        texts = [row["text"].split() for row in packed]
        assert sorted(sum(texts, [])) == sorted(WORDS) and len(texts) == len(packed) < 12
        for words in texts:
            places = [WORDS.index(word) for word in words]
            follow += [later == before + 1 for before, later in zip(places, places[1:], strict=False)]
    assert np.mean(follow) > 0.9  # short rests may be joined


def test_the_audio_between_segments_is_that_of_the_recording(processor, tmp_path, windows):
    rows = talk(tmp_path)
    whole = read_audio(rows[0]["audio"])
    for row in pack(rows, processor, timestamps=1):
        samples, times = windows.pop(), timestamps(row, processor)
        first = WORDS.index(row["text"].split()[0])
        run = [WORDS.index(word) for word in row["text"].split()]
        assert run == list(range(first, first + len(run)))  # one recording of one run
        start = round(rows[first]["start"] * 16000)
        begin = round(times[0] * 16000)
        offset = min(
            range(-400, 401), key=lambda shift: np.abs(samples[begin + shift :][:4000] - whole[start:][:4000]).sum()
        )
        assert abs(offset) <= 160  # timestamps are rounded to 0.02 s
        part = samples[begin + offset :]
        np.testing.assert_array_equal(part, whole[start : start + len(part)])
        for place, number in enumerate(run):
            assert times[2 * place] - times[0] == pytest.approx(
                rows[number]["start"] - rows[first]["start"], abs=0.021
            )
            assert times[2 * place + 1] - times[0] == pytest.approx(
                rows[number]["end"] - rows[first]["start"], abs=0.021
            )


def test_a_segment_across_the_end_has_a_start_alone(processor, tmp_path, windows):
    rows = talk(tmp_path, times=[(0.0, 1.0), (1.1, 2.0), (2.3, 3.4), (3.5, 4.0)])
    packed = pack(rows, processor, timestamps=1)
    for epoch in range(6):
        packed.set_epoch(epoch)
        row = next(row for row in packed if "unu" in row["text"])
        samples, times = windows[-1], timestamps(row, processor)
        if row["text"] != "unu doi":
            continue
        # The first segment starts at 0 in the recording, so the gap before it is silence of up to 0.6 s.
        assert len(times) == 5 and times[4] - times[0] == pytest.approx(2.3, abs=0.021)
        assert len(samples) == 48000
        tokens = processor.tokenizer.convert_ids_to_tokens(row["labels"])
        assert tokens[-2] == f"<|{times[4]:.2f}|>" and tokens[-1] == "<|endoftext|>" and tokens[-3].startswith("<|")
        break
    else:
        pytest.fail("no window was cut")
    plain = next(row for row in pack(rows, processor, timestamps=0) if row["text"] == "unu doi")
    assert plain["attention_mask"].sum() < 280  # without timestamps nothing of a cut segment is heard


def test_labels_end_with_the_start_of_a_cut_segment(processor):
    tokenizer = processor.tokenizer
    labels = encode_segments(tokenizer, [(0.1, 1.0, "unu")], "ro", open_start=1.3)
    tokens = tokenizer.convert_ids_to_tokens(labels)
    assert tokens[:3] == ["<|ro|>", "<|transcribe|>", "<|0.10|>"]
    assert tokens[-3:] == ["<|1.00|>", "<|1.30|>", "<|endoftext|>"]
    with pytest.raises(ValueError, match="no token <|3.10|>"):
        encode_segments(tokenizer, [], "ro", open_start=3.1)


def test_labels_with_an_open_start_fit_into_the_decoder(processor, tmp_path):
    rows = talk(tmp_path, times=[(0.0, 1.0), (1.1, 3.9)])
    rows[0]["transcription"], rows[1]["transcription"] = "x" * 20, "y"
    assert len(pack(rows, processor, timestamps=1, max_label_length=27)[0]["labels"]) <= 27
    texts = {row["text"]: row for row in pack(rows, processor, timestamps=1, max_label_length=26)}
    assert len(texts["x" * 20]["labels"]) == 26  # with the leading space


def test_a_prompt_is_what_was_said_before_in_the_recording(processor, tmp_path):
    packed = pack(talk(tmp_path), processor, previous_text=1)
    for row in packed:
        first = WORDS.index(row["text"].split()[0])
        if first:
            assert processor.tokenizer.decode(row["prompt_ids"][1:]).strip() == " ".join(WORDS[:first])


def test_nothing_is_heard_across_a_long_pause_or_another_speaker(processor, tmp_path, windows):
    rows = talk(tmp_path, times=[(0.0, 0.5), (6.0, 6.5)])
    assert len(pack(rows, processor, timestamps=1)) == 1
    pack(rows, processor, timestamps=1)[0]
    assert len(windows[0]) < 16000 * 2.3  # joined with a short gap
    rows = [{**row, "who": who} for row, who in zip(talk(tmp_path), "aababbabbaab", strict=True)]
    whose = {row["transcription"]: row["who"] for row in rows}
    for row in pack(rows, processor, speaker_column="who"):
        assert len({whose[word] for word in row["text"].split()}) == 1


def test_segments_and_single_recordings_share_a_dataset(processor, tmp_path):
    rows = talk(tmp_path)
    single = talk(tmp_path, "single.wav", times=[(0.0, 0.5)])
    single[0].update(start=None, end=None, transcription="singur")
    texts = [word for row in pack(rows + single, processor) for word in row["text"].split()]
    assert sorted(texts) == sorted([*WORDS, "singur"])


def test_refused_segments_are_counted_and_named(processor, tmp_path, caplog):
    rows = talk(tmp_path, times=[(0.0, 0.5), (0.55, 3.58), (3.6, 4.5), (4.0, 5.0), (6.0, 5.5), (6.0, 6.5)])
    rows += [{**rows[0], "start": 90.0, "end": 91.0}]
    packed = pack(rows, processor)
    counts = {name: count for name, count in packed.counts.items() if count}
    assert counts == {"kept": 2, "too_long": 1, "overlap": 2, "bad_times": 1, "beyond_audio": 1}
    assert [row["text"] for row in packed] in (["unu sase"], ["sase unu"])
    for words in ("3.0 s of audio, longer than a window of 3 s", "it overlaps item 3", "item 4", "has only 6.90 s"):
        assert words in caplog.text


def test_a_stream_of_segments_is_packed_too(processor, tmp_path):
    rows = talk(tmp_path)
    for row in rows:
        row["text"] = row.pop("transcription")
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    packed = pack_utterances(stream, processor, "ro", max_seconds=3.0, timestamps=1, single=0)
    assert isinstance(packed, PackedStream)
    first = list(packed)
    assert sorted(" ".join(row["text"] for row in first).split()) == sorted(WORDS) and len(first) < 12


def test_a_part_of_the_recording_is_read_for_a_window(processor, tmp_path, monkeypatch):
    packed = pack(talk(tmp_path), processor)
    read, frames = soundfile.SoundFile.read, []
    monkeypatch.setattr(
        soundfile.SoundFile,
        "read",
        lambda self, number=-1, **kind: frames.append(number) or read(self, number, **kind),
    )
    packed[1]
    assert frames and all(0 < number <= 48000 for number in frames)


@pytest.mark.parametrize("seed", range(5))
def test_plans_keep_chains_in_order_and_windows_within_their_length(seed):
    seconds = [0.5 + (7 * k % 11) / 4 for k in range(40)]
    before = {k: (k - 1, 0.3 * (k % 4)) for k in range(1, 40) if k % 13}
    planned = WindowPlan(seconds, [10] * 40, ["ro"] * 40, 30.0, 440, 0.1, seed, before)
    for epoch in range(4):
        windows = planned.windows(epoch)
        assert sorted(member for window in windows for member in window.utterances) == list(range(40))
        assert len(windows) == len(planned)
        for window in windows:
            total = sum(seconds[member] for member in window.utterances) + sum(window.gaps)
            assert total + sum(window.cut or ()) <= 30.0 + 1e-6
            last = window.utterances[-1]
            if window.cut is not None:
                assert window.cut[0] == before[last + 1][1] and 0 < window.cut[1] < seconds[last + 1]
                assert total + sum(window.cut) == pytest.approx(30.0)
            for place, member in enumerate(window.utterances):
                if place and before.get(member, (None,))[0] == window.utterances[place - 1]:
                    assert window.gaps[place] == before[member][1]
