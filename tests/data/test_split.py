"""Recordings without splits: no sentence is in two parts."""

import random

import pytest

from peft_clsr.data.split import split_by_text


def test_parts_hold_a_tenth_each_and_do_not_depend_on_the_order():
    texts = [f"Propoziția numărul {i // 2}." for i in range(200)]
    parts = split_by_text(texts)
    assert {part: parts.count(part) for part in set(parts)} == {"train": 160, "validation": 20, "test": 20}
    shuffled = random.Random(0).sample(range(200), 200)
    assert split_by_text([texts[i] for i in shuffled]) == [parts[i] for i in shuffled]


def test_a_sentence_is_in_one_part_whatever_its_case_spaces_and_punctuation():
    spellings = ["Bună ziua", "bună  ziua!", "BUNĂ ZIUA.", "bun\u0061\u0306 ziua"]
    texts = [f"{spelling} {i}" for i in range(30) for spelling in spellings]
    parts = split_by_text(texts)
    assert all(len(set(parts[i : i + 4])) == 1 for i in range(0, len(texts), 4))
    assert set(parts) == {"train", "validation", "test"}


def test_marks_tell_words_apart():
    assert sorted(split_by_text(["की", "का", "के"])) == ["test", "train", "validation"]


def test_a_frequent_sentence_is_trained_on():
    parts = split_by_text(["da"] * 50 + [f"text {i}" for i in range(50)])
    assert set(parts[:50]) == {"train"} and parts.count("test") == parts.count("validation") == 10


def test_recordings_without_text_are_in_no_held_out_part():
    assert split_by_text(["", " ", "a", "b", "c"])[:2] == ["train", "train"]


def test_too_few_sentences_are_refused():
    with pytest.raises(ValueError, match="2 different sentences cannot be split into train, validation, test"):
        split_by_text(["da", "Da!", "nu"])


def test_a_tenth_can_be_held_out_of_the_training_recordings():
    texts = [f"text {i}" for i in range(50)]
    parts = split_by_text(texts, ("train", "dev"))
    assert (parts.count("train"), parts.count("dev")) == (45, 5)
    assert sorted(split_by_text(["da", "nu"], ("train", "dev"))) == ["dev", "train"]
    with pytest.raises(ValueError, match="1 different sentences cannot be split into train, dev"):
        split_by_text(["da", "Da!"], ("train", "dev"))
