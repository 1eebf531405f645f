"""Calls of `generate` that name no language: whose expert answers, and what is said where it is none's."""

import warnings

import pytest
import torch
from helpers import noise, random_clsr
from training import collate, distiller, make_args
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, pipeline

from peft_clsr import CLSRConfig, encode_labels
from peft_clsr.inference.transcribe import transcribe_waveforms


def features(batch=2, seed=0):
    return torch.randn(batch, 80, 100, generator=torch.Generator().manual_seed(seed))


def hears(model, language):
    """Makes a model detect one language, whatever it is given."""
    whisper = model.get_base_model()
    detect = type(whisper).detect_language

    def detect_one(*args, **kwargs):
        config = kwargs.setdefault("generation_config", whisper.generation_config)
        return torch.full_like(detect(whisper, *args, **kwargs), config.lang_to_id[f"<|{language}|>"])

    whisper.detect_language = detect_one
    return model


@pytest.fixture
def model(tiny_whisper):
    """Experts for Romanian, which is active, and Catalan."""
    return random_clsr(tiny_whisper(init_std=0.2), "ro", "ca")


def generate(model, **options):
    options = {"input_features": features(1), "task": "transcribe", "max_new_tokens": 8, "do_sample": False} | options
    return model.generate(**options)


def said(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if "active adapter" in str(warning.message)]


def test_a_detected_language_without_an_expert_is_told_once(model, tiny_whisper):
    hears(model, "fr")
    (message,) = said(lambda: generate(model))
    for part in ("detected 'fr'", "no adapter", "the base model answers", "'ro', 'ca'", 'language="ro"', "trainer"):
        assert part in message
    assert not said(lambda: generate(model))
    hears(model, "bg")
    assert len(said(lambda: generate(model))) == 1  # another language
    other = hears(random_clsr(tiny_whisper(init_std=0.2), "ro"), "fr")
    assert len(said(lambda: generate(other))) == 1  # another model


def test_nothing_is_said_where_the_base_was_asked_for(model):
    assert not said(lambda: generate(hears(model, "ca")))  # it has an expert
    hears(model, "fr")
    assert not said(lambda: generate(model, language="fr"))
    assert not said(lambda: model.detect_language(features(1)))
    assert not said(lambda: generate(model, adapter_names=["ca"]))
    with model.disable_adapter():
        assert not said(lambda: generate(model))
    model.base_model.route_by_language = False
    assert not said(lambda: generate(model))
    model.base_model.route_by_language = True
    model.add_adapter("default", CLSRConfig.paper(gate_dim=8))
    model.set_adapter("default")  # takes all languages
    assert not said(lambda: generate(model))
    model.set_adapter("ro")
    assert len(said(lambda: generate(model))) == 1


def test_the_pipeline_and_transcribe_tell_it_too(tiny_whisper, tiny_processor):
    def fresh():
        whisper = tiny_whisper(init_std=0.2, vocab_size=len(tiny_processor.tokenizer) + 51)
        return hears(random_clsr(whisper, "ro"), "fr")

    recognizer = pipeline(
        "automatic-speech-recognition",
        model=fresh(),
        tokenizer=tiny_processor.tokenizer,
        feature_extractor=tiny_processor.feature_extractor,
    )
    options = {"generate_kwargs": {"max_new_tokens": 4, "num_beams": 1, "suppress_tokens": list(range(256, 280))}}
    assert len(said(lambda: recognizer(noise(0.5), **options))) == 1
    model = fresh()
    assert len(said(lambda: transcribe_waveforms(model, tiny_processor, [noise(0.5)], [None]))) == 1
    assert not said(lambda: transcribe_waveforms(model, tiny_processor, [noise(0.5)], [None]))


@pytest.mark.parametrize("where", ["config", "generation_config"])
def test_the_expert_follows_forced_decoder_ids_of_old_scripts(model, tiny_processor, where):
    expected = generate(model, language="ca")
    other = generate(model, language="bg")
    prompt = tiny_processor.tokenizer.convert_tokens_to_ids(["<|ca|>", "<|transcribe|>", "<|notimestamps|>"])
    getattr(model, where).forced_decoder_ids = list(enumerate(prompt, start=1))
    assert torch.equal(generate(hears(model, "fr"), task=None), expected)
    assert not torch.equal(expected, other)


def rows_of(tokenizer, languages, with_start=False, with_prompt=True, task="transcribe"):
    rows = []
    for index, language in enumerate(languages):
        labels = encode_labels(tokenizer, "ab", language, task)
        labels = labels if with_prompt else labels[3:]
        start = [tokenizer.convert_tokens_to_ids("<|startoftranscript|>")] if with_start else []
        rows.append({"input_features": features(1, seed=index)[0], "labels": torch.tensor(start + labels)})
    return rows


def plain_trainer(model, folder):
    options = {"predict_with_generate": True, "generation_max_length": 12, "generation_num_beams": 1}
    args = make_args(Seq2SeqTrainingArguments, folder, **options)
    return Seq2SeqTrainer(model=model, args=args, data_collator=collate)


def one_by_one(model, rows, languages, **options):
    options = {"max_length": 12, "num_beams": 1, "do_sample": False} | options
    return [
        model.generate(input_features=row["input_features"][None], language=language, **options)[0].tolist()
        for row, language in zip(rows, languages, strict=True)
    ]


def assert_predictions(predictions, expected):
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    for tokens, own in zip(predictions.tolist(), expected, strict=True):
        assert tokens[: len(own)] == own


@pytest.mark.parametrize("with_start", [False, True])
@pytest.mark.parametrize("made_by", ["peft", "transformers"])
def test_a_plain_trainer_evaluates_each_sample_in_the_language_of_its_labels(
    model, tiny_whisper, tiny_processor, tmp_path, with_start, made_by
):
    languages = ["ro", "ca", "ro"]
    rows = rows_of(tiny_processor.tokenizer, languages, with_start)
    expected = one_by_one(model, rows, languages)
    if made_by == "transformers":
        weights = {name: weight for name, weight in model.get_base_model().state_dict().items() if "clsr_" in name}
        model = tiny_whisper(init_std=0.2)
        for name in ("ro", "ca"):
            model.add_adapter(CLSRConfig.paper(gate_dim=8), name)
        model.set_adapter("ro")
        assert not model.load_state_dict(weights, strict=False).unexpected_keys
    predictions = []
    trainer = plain_trainer(model, tmp_path)
    assert not said(lambda: predictions.append(trainer.predict(rows).predictions))
    assert_predictions(predictions[0], expected)


def test_labels_of_a_translation_give_the_task_too(model, tiny_processor, tmp_path):
    rows = rows_of(tiny_processor.tokenizer, ["ca", "ro"], task="translate")
    expected = one_by_one(model, rows, ["ca", "ro"], task="translate")
    assert expected != one_by_one(model, rows, ["ca", "ro"])
    assert_predictions(plain_trainer(model, tmp_path).predict(rows).predictions, expected)


def test_a_language_that_was_given_comes_before_that_of_the_labels(model, tiny_processor, tmp_path):
    rows = rows_of(tiny_processor.tokenizer, ["ro", "ro"])
    expected = one_by_one(model, rows, ["ca", "ca"])
    assert_predictions(plain_trainer(model, tmp_path).predict(rows, language="ca").predictions, expected)
    model.generation_config.language = "ca"
    assert_predictions(plain_trainer(model, tmp_path).predict(rows).predictions, expected)


def test_a_plain_trainer_says_that_the_base_is_measured(model, tiny_processor, tmp_path):
    rows = rows_of(tiny_processor.tokenizer, ["ro"], with_prompt=False)
    (message,) = said(lambda: plain_trainer(hears(model, "fr"), tmp_path).predict(rows))
    assert "detected 'fr'" in message and 'model.generation_config.language = "ro"' in message
    rows = rows_of(tiny_processor.tokenizer, ["bg"])
    (message,) = said(lambda: plain_trainer(model, tmp_path).predict(rows))
    assert "the labels are in 'bg'" in message


@pytest.mark.parametrize("with_prompt", [False, True])
def test_the_distillation_trainer_takes_prompt_and_expert_from_the_batch(
    tiny_whisper, tiny_processor, tmp_path, with_prompt
):
    """Takes the language of the labels, else that of the adapter that is trained."""
    rows = rows_of(tiny_processor.tokenizer, ["ro", "ro"], with_prompt=with_prompt)
    model = random_clsr(tiny_whisper(init_std=0.2), "ro")
    expected = one_by_one(model, rows, ["ro", "ro"])
    options = {"predict_with_generate": True, "generation_max_length": 12, "generation_num_beams": 1}
    trainer = distiller(hears(model, "fr"), None, tmp_path, dataset=rows, **options)
    assert_predictions(trainer.predict(rows).predictions, expected)
    with model.base_model.route_samples(["ro"]):
        expected = one_by_one(model, rows, ["bg", "bg"])
    assert_predictions(trainer.predict(rows, language="bg").predictions, expected)
