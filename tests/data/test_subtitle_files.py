"""Files with times beside recordings: SRT, VTT and TextGrid, and tables with times."""

import pytest
import soundfile
from helpers import noise

datasets = pytest.importorskip("datasets")

from peft_clsr import load_recordings, pack_utterances
from peft_clsr.data.subtitle_files import read_timed_texts
from peft_clsr.data.table_reader import log_once

SRT = """1
00:00:00,500 --> 00:00:01,250
<i>Bună</i> ziua,
la toți.

2
00:01:02,000 --> 00:01:03,000
{\\an8}- Da &amp; nu: 00:00:01,000 sau 00:00:02,000.

3
00:01:04,000 --> 00:01:05,000

"""
VTT = """WEBVTT - a title

STYLE
::cue { color: red }

intro
00:00.500 --> 00:01.250 align:start position:0%
<v Ana>Bună ziua

NOTE a remark
in two lines

01:01:02.000 --> 01:01:03.000
Dar<00:00:01.920><c> nu</c><00:00:02.000><c> azi</c>
"""


def textgrid(*tiers):
    """A TextGrid in Praat's long format: pairs of a name and its intervals."""
    parts = [
        'File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0\nxmax = 9\ntiers? <exists>\n'
        f"size = {len(tiers)}\nitem []:\n"
    ]
    for number, (name, intervals) in enumerate(tiers, start=1):
        parts.append(
            f'    item [{number}]:\n        class = "IntervalTier"\n        name = "{name}"\n        xmin = 0\n'
            f"        xmax = 9\n        intervals: size = {len(intervals)}\n"
        )
        for place, (start, end, text) in enumerate(intervals, start=1):
            parts.append(
                f"        intervals [{place}]:\n            xmin = {start}\n            xmax = {end}\n"
                f'            text = "{text}"\n'
            )
    return "".join(parts)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Writes files by name into a folder; recordings are a second of noise."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    log_once.cache_clear()

    def write(**files):
        folder = tmp_path / "talks"
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                soundfile.write(path, noise(70.0, rate=1000), 1000)
            else:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    return lambda files: write(**files)


def read(path, tier="transcription", language=None):
    return [tuple(text)[:3] for text in read_timed_texts(path, tier, language)]


# ------------------------------------------------------------------ files


def test_srt(make):
    path = make({"talk.srt": SRT.replace("\n", "\r\n")}) / "talk.srt"
    assert read(path) == [
        ("0.500", "1.250", "Bună ziua, la toți."),
        ("62.000", "63.000", "- Da & nu: 00:00:01,000 sau 00:00:02,000."),
        ("64.000", "65.000", ""),
    ]
    assert [text.place for text in read_timed_texts(path, "")] == [f"{path}, line {line}" for line in (2, 7, 11)]


def test_srt_of_windows_is_read_in_the_code_page_of_its_language(make, caplog):
    folder = make({"talk.srt": "1\n00:00:00,500 --> 00:00:01,250\nbună ziua ţie\n".encode("cp1250")})
    assert read(folder / "talk.srt", language="ro") == [("0.500", "1.250", "bună ziua ţie")]
    assert "subtitles that are not in UTF-8 are read as cp1250" in caplog.text


def test_vtt(make):
    assert read(make({"talk.vtt": VTT}) / "talk.vtt") == [
        ("0.500", "1.250", "Bună ziua"),
        ("3662.000", "3663.000", "Dar nu azi"),
    ]


def test_bad_times_are_kept_to_be_named_and_do_not_join_texts(make):
    lines = "1\n00:00:01,000 --> 00:00:0x,000\nunu\n\n2\n00:02,000 --> 00:03,000\ndoi\n\n3\n-->\ntrei\n"
    assert read(make({"talk.srt": lines}) / "talk.srt") == [
        ("00:00:01,000", "00:00:0x,000", "unu"),
        ("00:02,000", "00:03,000", "doi"),  # without hours: these are read
        ("no time", "no time", "trei"),
    ]


def test_textgrid_takes_the_tier_of_the_name_or_the_only_one(make):
    words = ("words", [(0, 1, ""), (1, 2.5, "Bună  ziua"), (2.5, 3, "sil"), (3, 4, 'zis ""da""')])
    spoken = [("1", "2.5", "Bună ziua"), ("3", "4", 'zis "da"')]
    folder = make(
        {
            "one.TextGrid": textgrid(words, ("notes", [(0, 9, "")])),
            "two.TextGrid": textgrid(("phones", [(1, 2, "b")]), words).encode("utf-16"),
        }
    )
    assert read(folder / "one.TextGrid") == spoken
    assert read(folder / "two.TextGrid", "Words") == spoken
    with pytest.raises(ValueError, match=r"several interval tiers, 'phones', 'words': rename .* to 'transcription'"):
        read(folder / "two.TextGrid")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.srt", "Bună ziua\n", "no line has times"),
        ("a.vtt", "00:01.000 --> 00:02.000\nx\n", "its first line is not WEBVTT"),
        ("a.TextGrid", "Bună ziua\n", "is no TextGrid that praatio reads"),
        ("a.TextGrid", textgrid(("words", [(0, 1, "x")])).replace("xmax", "xm"), "is no TextGrid"),
        ("a.srt", b"1\n00:00:01,000 --> 00:00:02,000\n\xff\n", "line 3 is not utf-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(make, name, content, problem):
    path = make({name: content}) / name
    with pytest.raises(ValueError, match=problem) as error:
        read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("name", "content"), [("a.srt", " \n"), ("a.vtt", "WEBVTT\n\n"), ("a.TextGrid", "")])
def test_a_file_without_text_has_no_texts(make, name, content):
    assert read(make({name: content}) / name) == []


# ------------------------------------------------------------------ layouts

ONE = "1\n00:00:01,000 --> 00:00:02,000\nunu\n\n2\n00:00:02,500 --> 00:00:03,000\ndoi\n"


def segments(folder, split="train", language="ro", **options):
    rows = load_recordings(folder, language, split, **options)
    columns = ("audio", "start", "end", options.get("text_column", "transcription"))
    return [tuple(row[column].rpartition("/")[2] for column in columns) for row in rows]


SPOKEN = [("talk.wav", "1.000", "2.000", "unu"), ("talk.wav", "2.500", "3.000", "doi")]


@pytest.mark.parametrize(
    "files",
    [
        {"train/talk.srt": ONE, "train/talk.txt": "unu doi"},
        {"train/talk.ro.srt": ONE, "train/talk.en.srt": ONE.replace("unu", "one")},
        {"train/TALK.SRT": ONE, "train/talk.jpg": "x"},
        {"train/metadata.csv": "file_name\ntalk.wav\n", "train/talk.srt": ONE},
        {"train.csv": "file_name,transcription\ntrain/talk.wav,\n", "train/talk.srt": ONE},
        {"metadata.csv": "file_name,split\ntrain/talk.wav,train\nx.wav,test\n", "train/talk.srt": ONE},
        {"train/metadata.csv": "file_name,START,End,text\ntalk.wav,1.000,2.000,unu\ntalk.wav,2.500,3.000,doi\n"},
        {
            "train/metadata.jsonl": '{"file_name": "talk", "start": "1.000", "end": "2.000", "transcription": "unu"}\n'
            '{"file_name": "talk", "start": "2.500", "end": "3.000", "transcription": "doi"}\n'
        },
    ],
)
def test_segments_are_read_from_each_layout(make, files):
    assert segments(make({"train/talk.wav": None, **files})) == SPOKEN


def test_rows_of_a_file_have_its_line_and_go_into_windows(make, tiny_processor, caplog):
    folder = make({"train/talk.wav": None, "train/talk.srt": ONE + "\n3\n00:00:05,000 --> 00:00:04,000\ntrei\n"})
    packed = pack_utterances(
        load_recordings(folder, "ro", "train"), tiny_processor, "ro", max_seconds=0.7, timestamps=0
    )
    counts = {name: count for name, count in packed.counts.items() if count}
    assert counts == {"kept": 1, "too_long": 1, "bad_times": 1}
    assert f"({folder}/train/talk.srt, line 10): it ends at 4.00 s, not after its start at 5.00 s" in caplog.text


def test_recordings_with_and_without_times_are_in_one_folder(make):
    folder = make({"train/talk.wav": None, "train/talk.srt": ONE, "train/a.wav": None, "train/a.txt": "zero"})
    assert segments(folder) == [("a.wav", "", "", "zero"), *SPOKEN]


def test_an_empty_file_leaves_its_recording_out(make, caplog):
    folder = make({"train/talk.wav": None, "train/talk.srt": ONE, "train/a.wav": None, "train/a.vtt": "WEBVTT\n"})
    assert segments(folder) == SPOKEN and "a.vtt has no text, so" in caplog.text
    (folder / "train" / "talk.srt").write_text("")
    with pytest.raises(ValueError, match="2 recordings with a text file each, but all of these are empty"):
        segments(folder)


@pytest.mark.parametrize("table", ["train/metadata.csv", "metadata.csv"])
def test_a_table_whose_recordings_have_empty_files_alone_is_refused(make, table):
    folder = make({"train/talk.wav": None, table: "file_name\ntalk.wav\n", "train/talk.srt": ""})
    with pytest.raises(ValueError, match="no recording of split 'train' is left, because the files with times beside"):
        segments(folder)


def test_several_files_with_times_are_said(make, caplog):
    folder = make({"train/talk.wav": None, "train/talk.srt": ONE, "train/talk.vtt": VTT})
    assert segments(folder) == SPOKEN and "1 recordings have several files with times" in caplog.text


def test_a_recording_twice_needs_times(make):
    rows = "file_name,start,end,text\ntalk.wav,1,2,unu\ntalk.wav,,,doi\ntalk.wav,,,trei\n"
    with pytest.raises(ValueError, match="line 4 has the recording 'talk.wav' of line 3 again"):
        segments(make({"train/talk.wav": None, "train/metadata.csv": rows}))


def test_recordings_without_splits_are_split_whole(make, caplog):
    files = {f"{name}.wav": None for name in "abcdefghijkl"}
    files |= {f"{name}.srt": ONE.replace("unu", f"unu {name}") for name in "abcdefghijkl"}
    parts = [{row[0] for row in segments(make(files), part)} for part in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [10, 1, 1] and len(set.union(*parts)) == 12
    assert "split by recording: 20 train, 2 validation, 2 test" in caplog.text


def test_one_long_recording_is_split_in_time(make):
    lines = [f"{k}\n00:00:{k:02},000 --> 00:00:{k:02},900\nnumărul {k}\n" for k in range(20)]
    folder = make({"talk.wav": None, "talk.srt": "\n".join(lines)})
    starts = {part: [float(row[1]) for row in segments(folder, part)] for part in ("train", "validation", "test")}
    assert starts == {"train": list(range(16)), "validation": [16, 17], "test": [18, 19]}
