"""
Train the experts of several languages in one run, with a larger Whisper as the teacher.

    python examples/train_with_teacher.py --model openai/whisper-small --teacher openai/whisper-large-v2 \
        --data my_recordings --languages ca uk

The folder my_recordings has train/metadata.csv with the columns file_name, transcription and language.
"""

import argparse
from pathlib import Path

import datasets
import torch
from peft import get_peft_model
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from peft_clsr import (
    CLSRConfig,
    DataCollatorSpeechSeq2SeqWithPadding,
    DistillationTrainer,
    DistillationTrainingArguments,
    cache_teacher_states,
    load_recordings,
    prepare_dataset,
)

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="openai/whisper-small")
parser.add_argument("--teacher", default="openai/whisper-large-v2")
parser.add_argument("--data", required=True)
parser.add_argument("--languages", nargs="+", required=True)
parser.add_argument("--output_dir", default="runs/with-teacher")
parser.add_argument("--max_steps", type=int, default=-1)
options = parser.parse_args()

processor = WhisperProcessor.from_pretrained(options.model)
teacher_processor = WhisperProcessor.from_pretrained(options.teacher)
recordings = [load_recordings(options.data, language, "train") for language in options.languages]
recordings = datasets.concatenate_datasets(recordings)  # the column "language" has each row's language
dataset, _ = prepare_dataset(recordings, processor, teacher_processor=teacher_processor)

teacher = WhisperForConditionalGeneration.from_pretrained(options.teacher, dtype=torch.float32)
states = cache_teacher_states(dataset, teacher, teacher_processor, Path(options.output_dir, "teacher-states"))

model = WhisperForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
first, *others = [CLSRConfig(language=code) for code in options.languages]
model = get_peft_model(model, first, adapter_name=first.language)
for config in others:
    model.add_adapter(config.language, config)

collator = DataCollatorSpeechSeq2SeqWithPadding(processor, teacher_processor=teacher_processor)
arguments = DistillationTrainingArguments(options.output_dir, learning_rate=2e-3, max_steps=options.max_steps)
processors = {"processing_class": processor, "teacher_processor": teacher_processor}
data = {"train_dataset": states.dataset, "data_collator": collator}
trainer = DistillationTrainer(model=model, teacher_model=states, args=arguments, **processors, **data)
trainer.train()
model.save_pretrained(options.output_dir)
