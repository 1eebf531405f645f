"""Training and evaluation of languages that share a token in the prompt."""

import pytest
import torch
from helpers import clsr, randomize
from peft import get_peft_model
from training import adapter_weights, make_args

from peft_clsr import (
    CLSRConfig,
    DataCollatorSpeechSeq2SeqWithPadding,
    DistillationTrainer,
    DistillationTrainingArguments,
    make_compute_metrics,
)
from peft_clsr.data.labels import encode_labels

LANGUAGES = ["ca", "ca-valencia", "hsb", "ca_es"]


@pytest.fixture
def model(tiny_whisper):
    model = clsr(tiny_whisper(init_std=0.2), ["ca"])
    model.add_adapter("ca-valencia", CLSRConfig.paper(gate_dim=8))
    model.add_adapter("hsb", CLSRConfig.paper(language="hsb", prompt_language="ca", gate_dim=8))
    for seed, name in enumerate(model.peft_config):
        randomize(model, name, seed=seed, scale=0.3)
    return model


@pytest.fixture
def rows(tiny_processor):
    tokenizer = tiny_processor.tokenizer
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_features": torch.randn(80, 100, generator=generator),
            "labels": encode_labels(tokenizer, f"un {index}", "ca"),
            "language": language,
        }
        for index, language in enumerate(LANGUAGES)
    ]


def trainer_of(model, processor, folder, train, evaluation, **kwargs):
    args = make_args(
        DistillationTrainingArguments,
        folder,
        predict_with_generate=True,
        generation_max_length=10,
        per_device_eval_batch_size=2,
        **kwargs,
    )
    return DistillationTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=DataCollatorSpeechSeq2SeqWithPadding(processor),
        compute_metrics=make_compute_metrics(processor),
    )


def test_rates_are_those_of_each_adapter_though_they_share_a_token(model, tiny_processor, rows, tmp_path):
    trainer = trainer_of(model, tiny_processor, tmp_path, rows, rows)
    heard = []
    generate = trainer.model.generate

    def spy(*args, **kwargs):
        heard.append((trainer.model.base_model.routing.adapter_names, kwargs.get("language")))
        return generate(*args, **kwargs)

    trainer.model.generate = spy
    metrics = trainer.evaluate()
    assert [names for names, _ in heard] == [["ca", "ca-valencia"], ["hsb", "ca"]]
    assert {name for name in metrics if name.startswith("eval_wer_")} == {
        "eval_wer_ca",
        "eval_wer_ca-valencia",
        "eval_wer_hsb",
    }


def test_a_batch_trains_the_exact_expert(model, tiny_processor, rows, tmp_path):
    before = adapter_weights(model)
    only = [row for row in rows if row["language"] == "ca-valencia"]
    trainer_of(model, tiny_processor, tmp_path, only, rows, max_steps=1).train()
    moved = {name for name, weight in adapter_weights(model).items() if not torch.equal(weight, before[name])}
    assert moved and all(".ca-valencia." in name for name in moved)


def test_a_plain_trainer_is_told_the_languages(tiny_processor, rows):
    labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["labels"]) for row in rows], True, -100).numpy()
    from transformers import EvalPrediction

    prediction = EvalPrediction(predictions=labels, label_ids=labels)
    metrics = make_compute_metrics(tiny_processor, [*LANGUAGES[:3], "ca"])(prediction)
    assert {name for name in metrics if name.startswith("wer_")} == {"wer_ca", "wer_ca-valencia", "wer_hsb"}
    assert {name for name in make_compute_metrics(tiny_processor)(prediction) if name.startswith("wer_")} == {"wer_ca"}
    with pytest.raises(ValueError, match="2 languages for 4 utterances"):
        make_compute_metrics(tiny_processor, ["ca", "ca"])(prediction)


def test_a_broader_expert_trains_on_a_dialect_and_this_is_said(tiny_whisper, tiny_processor, rows, tmp_path):
    model = get_peft_model(tiny_whisper(), CLSRConfig.paper(language="ca", gate_dim=8), adapter_name="ca")
    only = [row for row in rows if row["language"] == "ca-valencia"]
    with pytest.warns(UserWarning, match="no adapter for 'ca-valencia', so 'ca' takes it, which is for 'ca'"):
        trainer = trainer_of(model, tiny_processor, tmp_path, only, only)
    assert [name for name in trainer.evaluate() if name.startswith("eval_wer_")] == ["eval_wer_ca"]


def test_a_language_without_any_expert_is_refused(model, tiny_processor, rows, tmp_path):
    rows = [{**row, "language": "rw"} for row in rows]
    with pytest.raises(ValueError, match="language 'rw' has no adapter on the model"):
        trainer_of(model, tiny_processor, tmp_path, rows, rows)
