"""Transcribe recordings of several languages in one batch, each with the expert of its language, or the base."""

import argparse

import torch
from peft import PeftModel
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from peft_clsr import read_audio

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("recordings", nargs="+", metavar="FILE=LANGUAGE", help="such as a.ogg=ca b.wav=uk c.mp3=de")
parser.add_argument("--model", default="openai/whisper-base")
parser.add_argument("--adapters", default="experts", help="folder with one folder a language")
parser.add_argument("--experts", nargs="+", default=["ca", "uk"], help="languages of the adapters to load")
options = parser.parse_args()

processor = WhisperProcessor.from_pretrained(options.model)
model = WhisperForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
first, *others = options.experts
model = PeftModel.from_pretrained(model, options.adapters, subfolder=first, adapter_name=first).eval()
for language in others:
    model.load_adapter(f"{options.adapters}/{language}", language)

files, languages = zip(*(recording.rsplit("=", 1) for recording in options.recordings), strict=True)
audio = [read_audio(file) for file in files]
features = processor(audio, sampling_rate=16000, return_tensors="pt").input_features
tokens = model.generate(input_features=features, language=list(languages), task="transcribe", max_new_tokens=200)
for file, text in zip(files, processor.batch_decode(tokens, skip_special_tokens=True), strict=True):
    print(f"{file}: {text.strip()}")
