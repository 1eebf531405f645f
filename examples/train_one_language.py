"""Train an expert for one language, from a folder with train/metadata.csv and test/metadata.csv."""

import argparse

import torch
from peft import get_peft_model
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from peft_clsr import (
    CLSRConfig,
    DataCollatorSpeechSeq2SeqWithPadding,
    DistillationTrainer,
    DistillationTrainingArguments,
    error_rates,
    load_recordings,
    prepare_dataset,
    transcribe,
)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="openai/whisper-base")
parser.add_argument("--dataset", default="my_recordings")
parser.add_argument("--language", default="ca")
parser.add_argument("--output_dir", default="runs/one_language")
parser.add_argument("--max_steps", type=int, default=-1)
options = parser.parse_args()

processor = WhisperProcessor.from_pretrained(options.model)
whisper = WhisperForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
# Settings for some hundred recordings, see docs/training.md.
config = CLSRConfig(
    language=options.language,
    expert_rank=64,
    straight_through=True,
    gate_budget=0.75,
    skip_gate_prob=0.0,
    expert_dropout=0.05,
)
model = get_peft_model(whisper, config, adapter_name=options.language)
model.print_trainable_parameters()

train_set, _ = prepare_dataset(
    load_recordings(options.dataset, options.language, "train"), processor, options.language
)
test_set, _ = prepare_dataset(load_recordings(options.dataset, options.language, "test"), processor, options.language)
trainer = DistillationTrainer(
    model=model,
    args=DistillationTrainingArguments(
        output_dir=options.output_dir,
        learning_rate=2e-3,
        num_train_epochs=3,
        max_steps=options.max_steps,
        per_device_train_batch_size=8,
        warmup_steps=0.1,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=train_set,
    data_collator=DataCollatorSpeechSeq2SeqWithPadding(processor, language=options.language),
)
trainer.train()
model.save_pretrained(options.output_dir)  # output_dir/ca

transcripts = transcribe(model, processor, test_set, options.language, max_new_tokens=64)
print(error_rates(transcripts, test_set["text"], language=options.language))
