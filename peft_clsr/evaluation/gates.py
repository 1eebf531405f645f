"""How often each gate chooses the expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..whisper import module_side, position_mask
from .mode import evaluation_mode


def gate_means(
    model: nn.Module, dataset: Any, collator: Callable[[list[Any]], dict[str, torch.Tensor]], batch_size: int = 8
) -> dict[str, float]:
    """
    Compute the mean gate of every routed module over a dataset: the share of tokens sent to the expert.

    The decoder reads the references (teacher forcing). Padding does not count: `attention_mask` selects encoder
    tokens, `labels` decoder tokens.

    Args:
        model (`PeftModel`): A model with an active CLSR adapter.
        dataset: Examples that `collator` takes.
        collator (`Callable`): Makes a batch of `input_features`, `attention_mask` and `labels` from examples.
        batch_size (`int`, *optional*, defaults to 8): Utterances at a time.

    Returns:
        `dict[str, float]`: module name to the mean, in [0, 1].
    """
    tuner: Any = model.base_model
    sums: dict[str, float] = {}
    tokens: dict[str, int] = {}
    with evaluation_mode(model), torch.inference_mode():
        for batch in tqdm(DataLoader(dataset, batch_size=batch_size, collate_fn=collator), desc="gate means"):
            # Other entries of the batch are for a teacher. Windows that follow a text have `decoder_input_ids`.
            names = {"input_features", "attention_mask", "labels", "decoder_input_ids"} & batch.keys()
            batch = {name: batch[name].to(model.device) for name in names}
            batch["input_features"] = batch["input_features"].to(model.dtype)
            decoder_mask = batch["labels"] != -100
            encoder_mask = position_mask(batch["attention_mask"]).bool()
            with tuner.record_gates() as gates:
                model(**batch)
            for name, gate in gates.items():
                mask = decoder_mask if module_side(name) == "decoder" else encoder_mask
                sums[name] = sums.get(name, 0.0) + gate[mask.to(gate.device)].double().sum().item()
                tokens[name] = tokens.get(name, 0) + int(mask.sum())
    return {name: sums[name] / max(tokens[name], 1) for name in sums}
