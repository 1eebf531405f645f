"""
The kinds of training script in docs/how-to/your-own-script.md, each with its lines added, on a tiny Whisper.
Where `noisy`, experts are the paper's, whose gates have noise, with the lines of that page's last section.
"""

import warnings

import pytest
import torch
from helpers import SMALL
from peft import get_peft_model, prepare_model_for_kbit_training
from training import adapter_weights, base_state, make_args, make_dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from peft_clsr import CLSRConfig, GateScheduleCallback, encode_labels, set_gate_progress

noisy_or_not = pytest.mark.parametrize("noisy", [False, True], ids=["defaults", "paper"])


def config(noisy, **settings):
    if noisy:
        return CLSRConfig.paper(language="ro", **{**SMALL, **settings, "gate_noise": 5.0})
    return CLSRConfig(language="ro", **SMALL, **settings)


def callbacks(noisy):
    return [GateScheduleCallback()] if noisy else []


def rows(tokenizer, texts=("unu", "doi", "trei", "patru")):
    """Prepared as the Hugging Face course does: features and labels alone."""
    features = [row["input_features"] for row in make_dataset(len(texts))]
    return [
        {"input_features": f, "labels": encode_labels(tokenizer, t, "ro")}
        for f, t in zip(features, texts, strict=True)
    ]


def collate(examples):
    labels = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(example["labels"]) for example in examples], batch_first=True, padding_value=-100
    )
    return {"input_features": torch.stack([example["input_features"] for example in examples]), "labels": labels}


@pytest.fixture
def silent():
    """No warning of this library."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert not [w for w in caught if "adapter" in str(w.message) or "noise" in str(w.message)]


@noisy_or_not
def test_a_seq2seq_trainer_trains_and_measures_the_expert(tiny_whisper, tiny_processor, tmp_path, silent, noisy):
    model = tiny_whisper()
    model.generation_config.language = "ro"
    model = get_peft_model(model, config(noisy), adapter_name="ro")
    before, base = adapter_weights(model), base_state(model)
    answered = []

    def compute_metrics(prediction):
        answered.append(prediction.predictions)
        return {"wer": 1.0}

    arguments = {"predict_with_generate": True, "generation_max_length": 12, "eval_strategy": "epoch", "max_steps": 2}
    trainer = Seq2SeqTrainer(
        model=model,
        args=make_args(Seq2SeqTrainingArguments, tmp_path, **arguments),
        train_dataset=rows(tiny_processor.tokenizer),
        eval_dataset=rows(tiny_processor.tokenizer),
        data_collator=collate,
        compute_metrics=compute_metrics,
        callbacks=callbacks(noisy),
    )
    trainer.train()
    assert any(not torch.equal(before[name], weight) for name, weight in adapter_weights(model).items())
    assert all(torch.equal(base[name], tensor) for name, tensor in base_state(model).items())
    features = torch.stack([row["input_features"] for row in rows(tiny_processor.tokenizer)])
    expected = model.generate(input_features=features, language="ro", max_length=12)
    assert torch.equal(torch.as_tensor(answered[-1])[:, : expected.shape[1]], expected)
    trainer.save_model()
    assert (tmp_path / "ro" / "adapter_model.safetensors").is_file()


@noisy_or_not
@pytest.mark.parametrize("freeze_encoder", [False, True])
def test_a_distillation_loop_trains_an_adapter_of_transformers(
    tiny_whisper, tiny_processor, tmp_path, silent, freeze_encoder, noisy
):
    student, teacher = tiny_whisper(), tiny_whisper(seed=1)
    exclude = {"exclude_modules": r".*encoder.*"} if freeze_encoder else {}
    student.add_adapter(config(noisy, **exclude), "ro")
    if freeze_encoder:  # as the script: parameters one by one, and the teacher takes the student's encoder
        for parameter in student.model.encoder.parameters():
            parameter.requires_grad = False
        teacher.model.encoder = student.model.encoder
    before, base = adapter_weights(student), base_state(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    batch = collate(rows(tiny_processor.tokenizer))
    for step in range(3):
        if noisy:
            set_gate_progress(student, step / 3)
        student.train()
        teacher.eval()
        outputs = student(**batch)
        with torch.no_grad():
            if freeze_encoder:
                states = BaseModelOutput(outputs.encoder_last_hidden_state)
                targets = teacher(encoder_outputs=states, labels=batch["labels"]).logits.softmax(-1)
            else:
                targets = teacher(**batch).logits.softmax(-1)
        kl = torch.nn.functional.kl_div(outputs.logits.log_softmax(-1), targets, reduction="batchmean")
        (0.8 * outputs.loss + kl).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = adapter_weights(student)
    sides = {side for name in after for side in ("encoder", "decoder") if f".{side}." in name}
    assert sides == ({"decoder"} if freeze_encoder else {"encoder", "decoder"})
    assert any(not torch.equal(before[name], weight) for name, weight in after.items())
    assert all(torch.equal(base[name], tensor) for name, tensor in base_state(student).items())
    student.eval().save_pretrained(tmp_path)
    fresh = tiny_whisper()
    fresh.load_adapter(str(tmp_path), adapter_name="ro")
    with torch.no_grad():
        assert torch.equal(fresh.eval()(**batch).logits, student(**batch).logits)


@noisy_or_not
def test_the_int8_notebook_trains_with_its_config_changed(tiny_whisper, tiny_processor, tmp_path, silent, noisy):
    model = prepare_model_for_kbit_training(tiny_whisper())
    model = get_peft_model(model, config(noisy, expert_rank=2), adapter_name="ro")
    before = adapter_weights(model)
    trainer = Seq2SeqTrainer(
        model=model,
        args=make_args(Seq2SeqTrainingArguments, tmp_path, max_steps=2),
        train_dataset=rows(tiny_processor.tokenizer),
        data_collator=collate,
        callbacks=callbacks(noisy),
    )
    trainer.train()
    assert any(not torch.equal(before[name], weight) for name, weight in adapter_weights(model).items())


def test_a_plain_loop_has_the_budget_in_its_loss(tiny_whisper, tiny_processor, silent):
    model = get_peft_model(tiny_whisper(), CLSRConfig.paper(language="ro", **SMALL), adapter_name="ro").train()
    batch = collate(rows(tiny_processor.tokenizer))
    set_gate_progress(model, 0.0)
    outputs = model(**batch)
    start = shift_tokens_right(batch["labels"], model.config.pad_token_id, model.config.decoder_start_token_id)
    logits = model(input_features=batch["input_features"], decoder_input_ids=start).logits
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    with model.base_model.record_gates() as gates:
        model(**batch)
    assert gates and outputs.loss.item() == pytest.approx(ce.item() + model.base_model.budget_loss().item(), rel=1e-5)
