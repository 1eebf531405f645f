"""Training: data, losses, and the trainer."""

from .arguments import DistillationTrainingArguments
from .callbacks import GateScheduleCallback
from .collator import DataCollatorSpeechSeq2SeqWithPadding
from .trainer import DistillationTrainer

__all__ = [
    "DataCollatorSpeechSeq2SeqWithPadding",
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "GateScheduleCallback",
]
