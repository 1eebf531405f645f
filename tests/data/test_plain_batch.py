"""`PlainCollator`: batches that transformers' own trainer takes."""

import pytest
import torch
import torch.nn.functional as F
from helpers import clsr
from training import collate, make_args, make_dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from peft_clsr import PlainCollator


def test_a_batch_has_tensors_only_and_the_labels_shifted_right(tiny_whisper):
    config = tiny_whisper().config
    start, padding = config.decoder_start_token_id, config.pad_token_id
    rows = make_dataset(size=2, lengths=(1, 3), languages=("ca", "uk"))
    batch, expected = PlainCollator(collate, config)(rows), collate(rows)
    assert set(batch) == {"input_features", "labels", "decoder_input_ids"}
    assert torch.equal(batch["labels"], expected["labels"])
    assert torch.equal(batch["input_features"], expected["input_features"])
    one, other = (row["labels"].tolist() for row in rows)
    assert batch["decoder_input_ids"].tolist() == [[start, *one, padding], [start, *other[:2]]]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_plain_trainer_has_the_cross_entropy_as_its_loss(readable_whisper, tmp_path, label_smoothing):
    """Also with label smoothing, for which Trainer removes the labels before the forward pass."""
    dataset = make_dataset(size=4, lengths=(5, 3), languages=("ca",))
    model = clsr(readable_whisper(), budget_weight=0.0)
    trainer = Seq2SeqTrainer(
        model=model,
        args=make_args(
            Seq2SeqTrainingArguments, tmp_path, max_steps=1, learning_rate=0.0, label_smoothing_factor=label_smoothing
        ),
        train_dataset=dataset,
        data_collator=PlainCollator(collate, model.config),
    )
    trainer.train()
    batch = PlainCollator(collate, model.config)(dataset)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=label_smoothing)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)
