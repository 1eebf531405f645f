"""Batches for transformers' own `Seq2SeqTrainer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from .collator import DataCollatorSpeechSeq2SeqWithPadding


@dataclass
class PlainBatchCollator:
    """
    Makes batches of tensors alone, with `decoder_input_ids`, for a model that `Seq2SeqTrainer` trains, such as LoRA.

    With label smoothing, `Trainer` takes the labels out of the batch before Whisper could shift them, so the decoder
    inputs must be in it. Whisper's forward takes no `language`.

    Args:
        collator ([`DataCollatorSpeechSeq2SeqWithPadding`]): Makes the batch.
        config (`WhisperConfig`): The model's, for the padding and start tokens.
    """

    collator: DataCollatorSpeechSeq2SeqWithPadding
    config: Any

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns the collator's batch without `language`, and with `decoder_input_ids` int64 [batch, tokens]."""
        batch = {name: value for name, value in self.collator(examples).items() if name != "language"}
        start_id, padding_id = self.config.decoder_start_token_id, self.config.pad_token_id
        return {**batch, "decoder_input_ids": shift_tokens_right(batch["labels"], padding_id, start_id)}
