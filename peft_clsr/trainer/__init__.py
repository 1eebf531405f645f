"""Training: data, losses, and the trainer."""

from .arguments import DistillationTrainingArguments
from .callbacks import GateScheduleCallback
from .collator import DataCollatorSpeechSeq2SeqWithPadding
from .sampler import LanguageBatchIterable, LanguageBatchSampler
from .teacher_states import TeacherStates, cache_teacher_states, load_teacher_states
from .trainer import DistillationTrainer

__all__ = [
    "DataCollatorSpeechSeq2SeqWithPadding",
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "GateScheduleCallback",
    "LanguageBatchIterable",
    "LanguageBatchSampler",
    "TeacherStates",
    "cache_teacher_states",
    "load_teacher_states",
]
