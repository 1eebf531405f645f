"""
Transcribe recordings of several languages in one batch: each is decoded by the expert of its language.

    python examples/transcribe_mixed_batch.py --model openai/whisper-base --adapters runs/with-teacher \
        --recordings ca=a.ogg uk=b.ogg de=c.ogg

A language without an expert is decoded by the base model. `peft-clsr transcribe` takes folders and long recordings.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from peft_clsr import read_audio, read_languages, set_audio_context

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="openai/whisper-base")
parser.add_argument("--adapters", required=True, help="folder with one folder per language")
parser.add_argument("--recordings", nargs="+", required=True, metavar="LANGUAGE=FILE")
parser.add_argument("--max_new_tokens", type=int)
options = parser.parse_args()

processor = WhisperProcessor.from_pretrained(options.model)
model = WhisperForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
for expert in read_languages(Path(options.adapters)):
    if isinstance(model, PeftModel):
        model.load_adapter(Path(options.adapters, expert.subfolder), expert.code)
    else:
        model = PeftModel.from_pretrained(
            model, options.adapters, subfolder=expert.subfolder, adapter_name=expert.code
        )
        if expert.max_audio_seconds is not None:  # trained at a shorter context
            set_audio_context(None, processor, expert.max_audio_seconds)

languages, files = zip(*(recording.split("=", 1) for recording in options.recordings), strict=True)
audio = [read_audio(file) for file in files]
features = processor(audio, sampling_rate=16_000, return_tensors="pt").input_features
tokens = model.eval().generate(
    input_features=features, language=list(languages), max_new_tokens=options.max_new_tokens
)
for file, text in zip(files, processor.batch_decode(tokens, skip_special_tokens=True), strict=True):
    print(f"{file}: {text.strip()}")
