"""Training steps of a trainer, one at a time, and the settings that all trainers of the benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainer


def trainer_settings(folder: str | Path, batch_size: int) -> dict[str, Any]:
    """Arguments of a trainer that writes nothing but to `folder`."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch_size,
        "train_sampling_strategy": "sequential",  # the same batches for all
        "remove_unused_columns": False,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
    }


def training_steps(trainer: Seq2SeqTrainer) -> Iterator[None]:
    """Takes a training step at each `next`: what `Trainer.train` does for one, without logging and callbacks."""
    trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    while True:
        batches = iter(trainer.get_train_dataloader())
        while True:
            batch, num_items = trainer.get_batch_samples(batches, 1, trainer.args.device)
            if not batch:
                break
            trainer.training_step(model, batch[0], num_items)
            trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
            optimizer.step()
            model.zero_grad()
            yield
