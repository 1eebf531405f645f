"""Train experts of several languages in one run, taught by a larger Whisper whose states are cached on disk."""

import argparse

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

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--student", default="openai/whisper-small")
parser.add_argument("--teacher", default="openai/whisper-large-v2")
parser.add_argument("--dataset", default="my_recordings", help="folder whose tables have a column language")
parser.add_argument("--languages", nargs="+", default=["ca", "uk"])
parser.add_argument("--output_dir", default="runs/with_teacher")
parser.add_argument("--max_steps", type=int, default=-1)
options = parser.parse_args()

processor = WhisperProcessor.from_pretrained(options.student)
teacher_processor = WhisperProcessor.from_pretrained(options.teacher)
parts = [
    prepare_dataset(
        load_recordings(options.dataset, language, "train"), processor, language, teacher_processor=teacher_processor
    )[0]
    for language in options.languages
]
train_set = datasets.concatenate_datasets(parts)  # its column `language` says which expert each example trains

teacher = WhisperForConditionalGeneration.from_pretrained(options.teacher, dtype=torch.float32)
states = cache_teacher_states(train_set, teacher, teacher_processor, f"{options.output_dir}/teacher")

student = WhisperForConditionalGeneration.from_pretrained(options.student, dtype=torch.float32)
first, *others = options.languages
model = get_peft_model(student, CLSRConfig(language=first), adapter_name=first)
for language in others:
    model.add_adapter(language, CLSRConfig(language=language))

trainer = DistillationTrainer(
    model=model,
    teacher_model=states,
    teacher_processor=teacher_processor,
    processing_class=processor,
    args=DistillationTrainingArguments(
        output_dir=options.output_dir,
        learning_rate=1e-4,
        num_train_epochs=10,
        max_steps=options.max_steps,
        warmup_steps=0.1,
        label_smoothing_factor=0.1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=states.dataset,
    data_collator=DataCollatorSpeechSeq2SeqWithPadding(processor, teacher_processor=teacher_processor),
)
trainer.train()
model.save_pretrained(options.output_dir)  # output_dir/ca, output_dir/uk
