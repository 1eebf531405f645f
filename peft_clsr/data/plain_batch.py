"""Batches for transformers' own trainers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.whisper.modeling_whisper import shift_tokens_right


@dataclass
class PlainCollator:
    """
    Collator for a plain `Seq2SeqTrainer`: wraps another one, and keeps the tensors of its batches only.

    It adds `decoder_input_ids`: for label smoothing, Trainer removes the labels before Whisper could shift them.

    Args:
        collator (`Callable`): Makes a batch with `labels` of a list of examples, such as
            [`DataCollatorSpeechSeq2SeqWithPadding`].
        config (`PretrainedConfig`): The model's, for its padding and start tokens.

    Example:

    ```py
    >>> trainer = Seq2SeqTrainer(model, args, data_collator=PlainCollator(collator, model.config), ...)
    ```
    """

    collator: Callable[[list[Any]], dict[str, Any]]
    config: PretrainedConfig

    def __call__(self, examples: list[Any]) -> dict[str, torch.Tensor]:
        """
        Make a batch of the wrapped collator plain.

        Args:
            examples (`list`): As the wrapped collator takes them.

        Returns:
            `dict`: the batch without what is no tensor (`language`), and `decoder_input_ids` int64 [batch, tokens].
        """
        batch = {name: value for name, value in self.collator(examples).items() if isinstance(value, torch.Tensor)}
        if "decoder_input_ids" in batch:
            return batch
        config = self.config
        start = shift_tokens_right(batch["labels"], config.pad_token_id, config.decoder_start_token_id)
        return {**batch, "decoder_input_ids": start}
