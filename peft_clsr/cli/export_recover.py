"""Recovers what freezing costs: the routed model teaches its frozen form."""

from __future__ import annotations

import tempfile
from typing import Any

from peft import PeftModel

from ..data.collator import DataCollatorSpeechSeq2SeqWithPadding
from ..data.labels import has_timestamps
from ..data.packing import pack_utterances
from ..distillation.arguments import DistillationTrainingArguments
from ..distillation.trainer import DistillationTrainer
from .export_inputs import ExportInputs

_STEP_SECONDS = 30.0  # of windows


def load_windows(inputs: ExportInputs) -> Any:
    """Windows of the training recordings, of the model's context. Raises a `ValueError` if there are none."""
    arguments = inputs.arguments
    return pack_utterances(
        inputs.load_split(arguments.recover_split),
        inputs.processor,
        inputs.code,
        prompt_language=inputs.prompt,
        max_seconds=inputs.seconds,
        timestamps=0.5 if has_timestamps(inputs.processor.tokenizer) else 0.0,
        audio_column=arguments.audio_column,
        text_column=arguments.text_column,
        max_label_length=inputs.model.config.max_target_positions,
    )


def recover(inputs: ExportInputs, student: PeftModel, windows: Any) -> None:
    """Train a student, from [`FrozenRouting.student`], for the steps of `--recover_steps`, by its teacher alone."""
    arguments = inputs.arguments
    with tempfile.TemporaryDirectory() as folder:
        training = DistillationTrainingArguments(
            output_dir=folder,
            max_steps=arguments.recover_steps,
            learning_rate=arguments.recover_learning_rate,
            per_device_train_batch_size=max(1, round(_STEP_SECONDS / inputs.seconds)),
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            ce_weight=0.0,
            kd_weight=1.0,
            save_strategy="no",
            report_to="none",
            logging_steps=10,
            dataloader_pin_memory=False,
        )
        trainer = DistillationTrainer(
            model=student,
            args=training,
            teacher_model=inputs.model,
            train_dataset=windows,
            data_collator=DataCollatorSpeechSeq2SeqWithPadding(inputs.processor, language=inputs.code),
        )
        trainer.train()
