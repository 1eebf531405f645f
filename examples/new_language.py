"""
Train an expert for a language that Whisper has no token for: Esperanto, under the token of Italian, which is similar.

    python -m examples.new_language --model openai/whisper-base

The speech is synthetic: Debian's translations of messages, spoken by espeak-ng (examples/demo/speak.py).
"""

import argparse

from peft import get_peft_model
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from examples.demo.speak import make_speech
from peft_clsr import (
    CLSRConfig,
    DataCollatorSpeechSeq2SeqWithPadding,
    DistillationTrainer,
    DistillationTrainingArguments,
    error_rates,
    load_recordings,
    pack_utterances,
    prepare_dataset,
    transcribe,
)

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="openai/whisper-base")
parser.add_argument("--language", default="eo", help="one of espeak-ng and of Debian's catalogues")
parser.add_argument("--prompt_language", default="it", help="a similar one that Whisper knows")
parser.add_argument("--max_steps", type=int, default=120, help="of two windows of 30 s")
parser.add_argument("--bf16", action="store_true", help="train in bfloat16, on a CPU that has such instructions")
parser.add_argument("--test_size", type=int, default=60)
options = parser.parse_args()
language, names = options.language, {"language": options.language, "prompt_language": options.prompt_language}

data = make_speech(".cache", language)
processor = WhisperProcessor.from_pretrained(options.model)
whisper = WhisperForConditionalGeneration.from_pretrained(options.model, dtype="float32")
train_set = pack_utterances(load_recordings(data, language, "train"), processor, **names)
test_set, _ = prepare_dataset(load_recordings(data, language, "test", limit=options.test_size), processor, **names)


def measure(name, model, language):
    texts = transcribe(model, processor, test_set, language, max_new_tokens=96)
    rates = error_rates(texts, test_set["text"], language=options.language)[options.language]
    print(f"{name}: WER {rates['wer']:.1%}, CER {rates['cer']:.1%}")


measure("before", whisper, options.prompt_language)
model = get_peft_model(whisper, CLSRConfig(**names), adapter_name=language)
settings = {"max_steps": options.max_steps, "per_device_train_batch_size": 2, "learning_rate": 2e-3}
settings |= {"adam_beta2": 0.98, "warmup_steps": 0.1, "bf16": options.bf16, "use_cpu": options.bf16}
args = DistillationTrainingArguments("runs/new-language", **settings)
collator = DataCollatorSpeechSeq2SeqWithPadding(processor)
DistillationTrainer(model=model, args=args, train_dataset=train_set, data_collator=collator).train()
model.save_pretrained(args.output_dir)
measure("after", model, language)
