"""Batches of the collator: the student's side, the language, and what a teacher gets."""

import pytest
import torch
from helpers import noise
from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

datasets = pytest.importorskip("datasets")
soundfile = pytest.importorskip("soundfile")

from peft_clsr import (
    DataCollatorSpeechSeq2SeqWithPadding,
    encode_labels,
    prepare_dataset,
    set_audio_context,
)


@pytest.fixture
def processor(tiny_processor):
    """5 s of context."""
    return WhisperProcessor(WhisperFeatureExtractor(chunk_length=5), tiny_processor.tokenizer)


@pytest.fixture
def teacher_processor(tiny_processor):
    """As large-v3 differs: 128 mel bins, and a language more, after which ids shift by one; without <|el|>."""
    tokens = sorted(tiny_processor.tokenizer.get_vocab(), key=tiny_processor.tokenizer.get_vocab().get)
    tokens.insert(tokens.index("<|fr|>") + 1, "<|yue|>")
    tokens[tokens.index("<|el|>")] = "<|mt|>"
    tokenizer = WhisperTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": [token for token in tokens if token.startswith("<|")]})
    tokenizer.set_prefix_tokens(language=None, task=None)
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=128, chunk_length=5), tokenizer)


def ids(tokenizer, *tokens):
    return tokenizer.convert_tokens_to_ids(list(tokens))


@pytest.fixture
def recordings(tmp_path):
    """2 s in Catalan and 1 s in Greek."""
    for name, seconds in (("a.wav", 2.0), ("b.wav", 1.0)):
        soundfile.write(tmp_path / name, noise(seconds), 16000, subtype="FLOAT")
    return datasets.Dataset.from_dict(
        {
            "audio": [str(tmp_path / "a.wav"), str(tmp_path / "b.wav")],
            "text": ["un peix", "una flor"],
            "language": ["ca", "greek"],
        }
    )


@pytest.fixture
def prepared(recordings, processor):
    return prepare_dataset(recordings, processor, text_column="text")[0]


@pytest.fixture
def raw(recordings):
    return list(recordings)


def test_labels_are_padded_with_minus_100(prepared, processor):
    batch = DataCollatorSpeechSeq2SeqWithPadding(processor)([prepared[0], prepared[1]])
    short, long = (encode_labels(processor.tokenizer, *row) for row in (("un peix", "ca"), ("una flor", "el")))
    assert batch["labels"].tolist() == [[*short, -100], long]
    assert batch["input_features"].shape == (2, 80, 500)
    assert batch["attention_mask"].sum(dim=1).tolist() == [200, 100]
    assert batch.keys() == {"input_features", "attention_mask", "labels", "language"}


def test_raw_and_prepared_examples_give_the_same_batch(raw, prepared, processor):
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor)
    expected, batch = collator(list(prepared)), collator(raw)
    assert batch.pop("language") == expected.pop("language") == ["ca", "el"]
    for key in expected:
        assert torch.equal(batch[key], expected[key])


def test_the_language_of_an_example_goes_before_the_collators(processor):
    audio = {"array": noise(0.5), "sampling_rate": 16000}
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, language="catalan")
    batch = collator([{"audio": audio, "text": "a", "language": "Romanian"}, {"audio": audio, "text": "a"}])
    assert batch["labels"][:, 0].tolist() == ids(processor.tokenizer, "<|ro|>", "<|ca|>")
    assert batch["language"] == ["ro", "ca"]
    with pytest.raises(ValueError, match="no language"):
        DataCollatorSpeechSeq2SeqWithPadding(processor)([{"audio": audio, "text": "a"}])
    with pytest.raises(ValueError, match="nor 'text'"):
        collator([{"audio": audio}])


def test_a_batch_has_the_languages_of_all_examples_or_none(processor):
    with_language = {"input_features": torch.zeros(80, 500), "labels": [5], "language": "catalan"}
    without = {"input_features": torch.zeros(80, 500), "labels": [5]}
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor)
    assert "language" not in collator([without, without])
    assert collator([with_language])["language"] == ["ca"]
    with pytest.raises(ValueError, match="example 1 of the batch has no 'language'"):
        collator([with_language, without])
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, language_column="spoken", language="ro")
    assert collator([with_language, {**without, "spoken": "el"}])["language"] == ["ro", "el"]


def test_labels_and_audio_that_are_too_long_are_refused(processor):
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, language="ca")
    features = torch.zeros(80, 500)
    assert collator([{"input_features": features, "labels": [5] * 448}])["labels"].shape == (1, 448)
    with pytest.raises(ValueError, match="labels of 449 tokens are longer than the decoder's limit of 448"):
        collator([{"input_features": features, "labels": [5] * 449}])
    with pytest.raises(ValueError, match=r"lasts 10\.0 s, longer than the context of 5 s"):
        collator([{"audio": {"array": noise(10.0), "sampling_rate": 16000}, "text": "a"}])


def test_a_start_token_in_prepared_labels_is_not_doubled(processor):
    start = processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor)
    assert collator([{"input_features": torch.zeros(80, 500), "labels": [start, 5, 6]}])["labels"].tolist() == [[5, 6]]


def test_an_unknown_language_is_refused_at_once(tiny_processor):
    with pytest.raises(ValueError, match="catalann"):
        DataCollatorSpeechSeq2SeqWithPadding(tiny_processor, language="catalann")


# ---------------------------------------------------------------- a teacher of other features and vocabulary


def test_a_teacher_gets_its_own_features_and_ids_of_the_same_tokens(
    recordings, raw, prepared, processor, teacher_processor
):
    for_both, counts = prepare_dataset(recordings, processor, teacher_processor=teacher_processor, text_column="text")
    assert counts["kept"] == 2
    assert set(for_both.column_names) - set(prepared.column_names) == {"teacher_input_features", "teacher_labels"}
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, teacher_processor=teacher_processor)
    of_raw = collator(raw)
    for batch in (collator(list(for_both)), of_raw):
        assert batch["teacher_input_features"].dtype == torch.float32
        for row, seconds in enumerate((2.0, 1.0)):
            expected = teacher_processor.feature_extractor(noise(seconds), sampling_rate=16000, return_tensors="pt")
            assert expected.input_features.shape == (1, 128, 500)
            assert torch.equal(batch["teacher_input_features"][row], expected.input_features[0])
        catalan = encode_labels(teacher_processor.tokenizer, "un peix", "ca")
        greek = encode_labels(teacher_processor.tokenizer, "una flor", "ro")
        assert batch["teacher_labels"].tolist() == [[*catalan, -100], [-100, *greek[1:]]]  # it has no <|el|>
        assert torch.equal(batch["input_features"], of_raw["input_features"])
        assert torch.equal(batch["labels"], of_raw["labels"])
    assert catalan[1] == processor.tokenizer.convert_tokens_to_ids("<|transcribe|>") + 1
    assert for_both[1]["teacher_labels"].tolist() == [-100, *greek[1:]]


def test_a_teacher_like_the_student_takes_the_students_batch(recordings, raw, processor):
    own = WhisperProcessor(WhisperFeatureExtractor(chunk_length=5), processor.tokenizer)
    columns = prepare_dataset(recordings, processor, teacher_processor=own, text_column="text")[0].column_names
    batch = DataCollatorSpeechSeq2SeqWithPadding(processor, teacher_processor=own)(raw)
    assert not any(name.startswith("teacher") for name in [*columns, *batch])


def test_rows_that_are_dropped_need_no_teacher(recordings, processor, teacher_processor):
    mute = recordings.map(lambda row, index: {"text": "" if index == 0 else row["text"]}, with_indices=True)
    for_both, counts = prepare_dataset(mute, processor, teacher_processor=teacher_processor, text_column="text")
    assert (counts["kept"], counts["no_text"]) == (1, 1)
    assert for_both["teacher_input_features"][:].shape == (1, 128, 500)


def test_teacher_labels_are_made_of_prepared_examples_but_features_are_not(prepared, processor, teacher_processor):
    other_vocabulary = WhisperProcessor(processor.feature_extractor, teacher_processor.tokenizer)
    batch = DataCollatorSpeechSeq2SeqWithPadding(processor, teacher_processor=other_vocabulary)(list(prepared))
    assert batch["teacher_labels"].shape == batch["labels"].shape and "teacher_input_features" not in batch
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, teacher_processor=teacher_processor)
    with pytest.raises(ValueError, match=r"example 0 .*'teacher_input_features'.*prepare_dataset\(teacher_processor="):
        collator(list(prepared))


def test_a_teacher_may_hear_a_longer_context(recordings, processor, tiny_processor):
    """A student cut to 5 s, whose teacher hears the same speech in the 30 s that it was trained on."""
    full = WhisperProcessor(WhisperFeatureExtractor(), tiny_processor.tokenizer)
    prepared, _ = prepare_dataset(recordings, processor, teacher_processor=full, text_column="text")
    batch = DataCollatorSpeechSeq2SeqWithPadding(processor)(list(prepared))
    assert batch["input_features"].shape == (2, 80, 500) and batch["teacher_input_features"].shape == (2, 80, 3000)
    torch.testing.assert_close(batch["teacher_input_features"][0, :, :200], batch["input_features"][0, :, :200])
    assert "teacher_labels" not in batch


def test_a_teacher_of_a_shorter_context_is_refused(recordings, processor, teacher_processor):
    set_audio_context(None, teacher_processor, 4)
    with pytest.raises(ValueError, match="a context of 4 s, shorter than the student's of 5 s.*set_audio_context"):
        DataCollatorSpeechSeq2SeqWithPadding(processor, teacher_processor=teacher_processor)
    with pytest.raises(ValueError, match="a context of 4 s, shorter than the student's of 5 s"):
        prepare_dataset(recordings, processor, teacher_processor=teacher_processor, text_column="text")


# ---------------------------------------------------------------- cached states of a teacher


def with_states(*examples, hidden=3, flat=True):
    """Prepared examples of so many labels, with states that count up."""
    made = []
    for tokens in examples:
        states = torch.arange(tokens * hidden, dtype=torch.float16).view(tokens, hidden)
        states = states.flatten().tolist() if flat else states
        made.append({"input_features": torch.zeros(80, 500), "labels": [5] * tokens, "teacher_states": states})
    return made


@pytest.mark.parametrize("flat", [True, False])
def test_states_are_padded_with_zeros(processor, flat):
    batch = DataCollatorSpeechSeq2SeqWithPadding(processor)(with_states(2, 3, flat=flat))
    assert batch["teacher_states"].dtype == torch.float16
    assert batch["teacher_states"].tolist() == [
        [[0, 1, 2], [3, 4, 5], [0, 0, 0]],
        [[0, 1, 2], [3, 4, 5], [6, 7, 8]],
    ]


def test_states_are_those_of_the_labels_without_a_start_token(processor):
    (example,) = with_states(2)
    example["labels"] = [processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>"), *example["labels"]]
    batch = DataCollatorSpeechSeq2SeqWithPadding(processor)([example])
    assert batch["labels"].tolist() == [[5, 5]]
    assert batch["teacher_states"].tolist() == [[[0, 1, 2], [3, 4, 5]]]


def test_states_stand_in_for_the_features_of_a_teacher(processor, teacher_processor):
    batch = DataCollatorSpeechSeq2SeqWithPadding(processor, teacher_processor=teacher_processor)(with_states(2, 3))
    assert batch["teacher_states"].shape == (2, 3, 3) and "teacher_labels" in batch
    assert "teacher_input_features" not in batch


@pytest.mark.parametrize("flat", [True, False])
def test_states_of_another_number_of_labels_are_refused(processor, flat):
    (example,) = with_states(3, hidden=4, flat=flat)
    example["labels"] = [5] * 5
    with pytest.raises(ValueError, match=rf"shape \({'12,' if flat else '3, 4'}\) .* each of 5 labels"):
        DataCollatorSpeechSeq2SeqWithPadding(processor)([example])


def test_a_batch_of_examples_with_and_without_states_is_refused(processor):
    one, other = with_states(2, 3)
    del other["teacher_states"]
    with pytest.raises(ValueError, match="example 1 of the batch has no 'teacher_states'"):
        DataCollatorSpeechSeq2SeqWithPadding(processor)([one, other])
