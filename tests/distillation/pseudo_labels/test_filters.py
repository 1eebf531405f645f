"""Filters of pseudo-labels."""

import datasets
import pytest

from peft_clsr import filter_pseudo_labels
from peft_clsr.distillation.pseudo_labels.filters import describe_hours, disagreements


def labels(texts=("un dos tres", "quatre", "cinc sis"), recordings=None, **columns):
    count = len(texts)
    defaults = {
        "log_probability": [-0.5] * count,
        "compression_ratio": [1.0] * count,
        "no_speech_probability": [0.1] * count,
        "wer": [None] * count,
        "seconds": [3600.0] * count,
        "start": [None] * count,
    }
    recordings = list(range(count)) if recordings is None else recordings
    rows = {"transcription": list(texts), "recording": recordings, **defaults, **columns}
    types = {name: datasets.Value("float64") for name in defaults}
    types |= {"transcription": datasets.Value("string"), "recording": datasets.Value("int64")}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(types))


@pytest.mark.parametrize(
    ("column", "values", "options"),
    [
        ("log_probability", [-0.5, -1.5, -1.0], {}),
        ("compression_ratio", [1.0, 2.5, 2.4], {}),
        ("no_speech_probability", [0.6, 0.7, 0.0], {}),
        ("wer", [0.3, 0.31, None], {"max_wer": 0.3}),
    ],
)
def test_each_filter_says_how_many_hours_it_removes(column, values, options):
    kept, hours = filter_pseudo_labels(labels(**{column: values}), **options)
    assert kept["recording"][:] == [0, 2]
    assert hours["total"] == 3 and hours["kept"] == 2 and hours[column] == 1
    assert sum(value for name, value in hours.items() if name not in ("total", "kept")) == 1
    assert f"{column} 1.00 h" in describe_hours(hours)


def test_a_filter_is_turned_off_by_none():
    rows = labels(log_probability=[-9.0] * 3)
    assert len(filter_pseudo_labels(rows, min_log_probability=None)[0]) == 3
    with pytest.raises(ValueError, match=r"no pseudo-label passes the filters \(0.00 of 3.00 h kept"):
        filter_pseudo_labels(rows)


def test_two_teachers_are_compared_word_by_word_though_they_divide_a_recording_differently():
    one = labels(["Un, dos tres", "quatre", "cinc sis"], recordings=[0, 0, 1])
    other = labels(["un dos", "TRES cinc", "cinc"], recordings=[0, 0, 1])
    assert disagreements(one, other, "ca") == [0.0, 1.0, 0.5]
    kept, hours = filter_pseudo_labels(one, other_labels=other, max_disagreement=0.5, language="ca")
    assert kept["transcription"][:] == ["Un, dos tres", "cinc sis"] and hours["disagreement"] == 1


def test_characters_are_compared_where_there_are_no_spaces():
    assert disagreements(labels(["你好世界"]), labels(["你好世间"]), "zh") == [0.25]


def test_labels_of_other_recordings_are_refused():
    with pytest.raises(ValueError, match="no recording of the first one's"):
        disagreements(labels(["a"], recordings=[0]), labels(["a"], recordings=[5]), "ca")
    with pytest.raises(ValueError, match=r"number 0 has 3500.00 s, not 3600.00 s"):
        disagreements(labels(["a"]), labels(["a"], seconds=[3500.0]), "ca")
    # Each teacher divides a long recording in its own way.
    parts = labels(["a"], seconds=[5.0], start=[0.0]), labels(["a"], seconds=[9.0], start=[1.0])
    assert disagreements(*parts, "ca") == [0.0]


@pytest.mark.parametrize("column", ["log_probability", "compression_ratio", "no_speech_probability"])
def test_a_row_without_a_score_does_not_pass_its_filter(column):
    value = {"log_probability": -0.5, "compression_ratio": 1.0, "no_speech_probability": 0.1}[column]
    kept, hours = filter_pseudo_labels(labels(**{column: [value, None, value]}))
    assert kept["recording"][:] == [0, 2] and hours[column] == 1


def test_a_limit_of_the_error_rate_without_transcripts_is_said_to_remove_nothing(caplog):
    assert len(filter_pseudo_labels(labels(), max_wer=0.1)[0]) == 3
    assert "max_wer removes nothing: no recording has a transcript" in caplog.text
