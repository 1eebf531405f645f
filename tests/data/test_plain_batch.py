"""Batches for trainers that are not ours."""

import numpy as np

from peft_clsr import DataCollatorSpeechSeq2SeqWithPadding, PlainBatchCollator


def test_decoder_inputs_of_plain_batches_are_the_labels_shifted(tiny_whisper, tiny_processor):
    config = tiny_whisper().config
    start, padding = config.decoder_start_token_id, config.pad_token_id
    collator = PlainBatchCollator(DataCollatorSpeechSeq2SeqWithPadding(tiny_processor), config)
    features = np.zeros((80, 100), dtype=np.float32)
    batch = collator(
        [{"input_features": features, "labels": labels, "language": "ro"} for labels in ([5, 6, 7, 8], [9, 10])]
    )
    assert batch["labels"].tolist() == [[5, 6, 7, 8], [9, 10, -100, -100]]
    assert batch["decoder_input_ids"].tolist() == [[start, 5, 6, 7], [start, 9, 10, padding]]
    assert set(batch) == {"input_features", "attention_mask", "labels", "decoder_input_ids"}
