"""
Train a language expert on recordings of one language, and measure it.

    python examples/train_one_language.py --model openai/whisper-base --data my_recordings --language ca

The folder my_recordings has train/metadata.csv and test/metadata.csv, with the columns file_name and transcription.
`peft-clsr train` does this with more options.
"""

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

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="openai/whisper-base")
parser.add_argument("--data", required=True)
parser.add_argument("--language", required=True)
parser.add_argument("--output_dir", default="runs/one-language")
parser.add_argument("--max_steps", type=int, default=-1)
options = parser.parse_args()

processor = WhisperProcessor.from_pretrained(options.model)
whisper = WhisperForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
train_recordings = load_recordings(options.data, options.language, "train")
test_recordings = load_recordings(options.data, options.language, "test")
train_set, _ = prepare_dataset(train_recordings, processor, options.language)
test_set, _ = prepare_dataset(test_recordings, processor, options.language)

config = CLSRConfig(language=options.language)
model = get_peft_model(whisper, config, adapter_name=config.language)
arguments = DistillationTrainingArguments(
    options.output_dir, learning_rate=2e-3, warmup_steps=0.1, adam_beta2=0.98, max_steps=options.max_steps
)
collator = DataCollatorSpeechSeq2SeqWithPadding(processor, language=config.language)
trainer = DistillationTrainer(model=model, args=arguments, train_dataset=train_set, data_collator=collator)
trainer.train()
model.save_pretrained(options.output_dir)

for name, measured in (("with the expert", model), ("base model", model.unload())):
    texts = transcribe(measured, processor, test_set, config.language)
    rates = error_rates(texts, test_set["text"], language=config.language)[config.language]
    rate = rates["rate"]  # "wer", or "cer" for languages without spaces between words
    print(f"{name}: {rate.upper()} {rates[rate]:.1%}")
