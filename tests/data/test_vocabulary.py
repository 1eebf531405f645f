import pytest
import torch
from conftest import SPECIAL_TOKENS
from transformers import WhisperTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from peft_clsr import VocabularyMap

YUE = SPECIAL_TOKENS.index("<|translate|>")
WITH_YUE = (*SPECIAL_TOKENS[:YUE], "<|yue|>", *SPECIAL_TOKENS[YUE:])


def tokenizer(special_tokens=SPECIAL_TOKENS):
    symbols = [*bytes_to_unicode().values(), *special_tokens]
    return WhisperTokenizer(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[])


def test_one_language_more_shifts_the_ids_behind_it():
    small, large = tokenizer(), tokenizer(WITH_YUE)
    yue = 256 + YUE
    vocabulary = VocabularyMap.between(small, large)
    assert vocabulary.student_ids.tolist() == list(range(len(small)))
    assert vocabulary.teacher_ids.tolist() == [*range(yue), *range(yue + 1, len(large))]
    assert vocabulary.student_ids.dtype == vocabulary.teacher_ids.dtype == torch.int64
    assert not vocabulary.is_identity
    for token_id, teacher_id in zip(vocabulary.student_ids, vocabulary.teacher_ids, strict=True):
        assert small.convert_ids_to_tokens(int(token_id)) == large.convert_ids_to_tokens(int(teacher_id))


def test_labels_are_translated_and_tokens_that_the_teacher_lacks_are_left_out():
    small, large = tokenizer(), tokenizer(WITH_YUE)
    prompt = ["<|ca|>", "<|transcribe|>", "<|notimestamps|>", "a", "<|endoftext|>"]
    labels = small.convert_tokens_to_ids(prompt)
    up, down = VocabularyMap.between(small, large), VocabularyMap.between(large, small)
    assert up.teacher_labels(labels) == large.convert_tokens_to_ids(prompt)
    assert down.teacher_labels(up.teacher_labels(labels)) == labels
    assert down.teacher_labels(large.convert_tokens_to_ids(["<|yue|>", "a"])) == [-100, labels[3]]


def test_labels_keep_their_kind_their_shape_and_their_padding():
    vocabulary = VocabularyMap.between(tokenizer(), tokenizer(WITH_YUE))
    translate = 256 + YUE
    labels = torch.tensor([[translate, 3, -100], [5, translate, 4]])
    expected = [[translate + 1, 3, -100], [5, translate + 1, 4]]
    mapped = vocabulary.teacher_labels(labels)
    assert mapped.dtype == torch.int64 and mapped.tolist() == expected
    assert labels[0, 0] == translate
    assert [vocabulary.teacher_labels(row) for row in labels.tolist()] == expected
    assert vocabulary.teacher_labels([]) == []


def test_ids_without_a_token_have_no_label():
    """Output layers have more rows than their tokenizers have tokens."""
    vocabulary = VocabularyMap.between(tokenizer(), tokenizer(WITH_YUE))
    assert vocabulary.teacher_labels([vocabulary.student_tokens, 51864]) == [-100, -100]


def test_equal_vocabularies_are_the_identity():
    vocabulary = VocabularyMap.between(tokenizer(), tokenizer())
    assert vocabulary.is_identity
    assert vocabulary.student_tokens == vocabulary.teacher_tokens == 256 + len(SPECIAL_TOKENS)
    longer = VocabularyMap.between(tokenizer(), tokenizer((*SPECIAL_TOKENS, "<|0.00|>")))
    assert torch.equal(longer.student_ids, longer.teacher_ids) and not longer.is_identity
    assert not VocabularyMap.between(tokenizer((*SPECIAL_TOKENS, "<|0.00|>")), tokenizer()).is_identity


def test_both_spellings_of_the_token_for_no_speech_are_one():
    spelled = [{"<|nospeech|>": "<|nocaptions|>"}.get(token, token) for token in SPECIAL_TOKENS]
    assert VocabularyMap.between(tokenizer(), tokenizer(spelled)).is_identity


def test_tokenizers_of_other_models_are_refused():
    class Words:
        def get_vocab(self):
            return {"hello": 0, "a": 1, "<|endoftext|>": 2}

    with pytest.raises(ValueError, match="has 2 of the student's 271 tokens.*not the tokenizers of two Whispers"):
        VocabularyMap.between(tokenizer(), Words())
