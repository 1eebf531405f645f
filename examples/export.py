"""Freeze the routing of an expert: a plain Whisper of one language, for any software that runs Whisper."""

import argparse

import torch
from peft import PeftModel
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from peft_clsr import freeze_routing, load_recordings, prepare_dataset, set_audio_context

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="openai/whisper-base")
parser.add_argument("--adapter", default="experts/ca", help="folder of the adapter")
parser.add_argument("--language", default="ca")
parser.add_argument("--dataset", default="my_recordings")
parser.add_argument("--output_dir", default="exports/whisper-ca")
options = parser.parse_args()

processor = WhisperProcessor.from_pretrained(options.model)
whisper = WhisperForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
model = PeftModel.from_pretrained(whisper, options.adapter, adapter_name=options.language)
seconds = model.peft_config[options.language].max_audio_seconds
if seconds is not None:  # the expert was trained at a shorter context
    set_audio_context(None, processor, seconds)

recordings = load_recordings(options.dataset, options.language, "test")
dataset, _ = prepare_dataset(recordings, processor, options.language)
frozen = freeze_routing(
    model, options.language, dataset=dataset, processor=processor, undecided="loss", max_new_tokens=64
)
print(frozen.decisions)
print(f"WER {frozen.before['wer']:.1%} routed, {frozen.after['wer']:.1%} frozen")
frozen.model.save_pretrained(options.output_dir)
processor.save_pretrained(options.output_dir)
