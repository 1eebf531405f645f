"""
Make a plain Whisper of a language expert, without gates, for other software such as CTranslate2.

    python examples/export.py --model openai/whisper-base --adapter runs/one-language --language ca \
        --data my_recordings --output_dir whisper-ca

The folder my_recordings has test/metadata.csv; error rates before and after are measured on it.
`peft-clsr export` goes on to CTranslate2.
"""

import argparse

import torch
from peft import PeftModel
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from peft_clsr import freeze_routing, load_recordings, prepare_dataset, set_audio_context

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="openai/whisper-base")
parser.add_argument("--adapter", required=True, help="folder with one folder per language")
parser.add_argument("--language", required=True, help="code")
parser.add_argument("--data", required=True)
parser.add_argument("--output_dir", required=True)
options = parser.parse_args()

processor = WhisperProcessor.from_pretrained(options.model)
whisper = WhisperForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
name = options.language
model = PeftModel.from_pretrained(whisper, options.adapter, subfolder=name, adapter_name=name)
seconds = model.peft_config[name].max_audio_seconds
if seconds is not None:  # trained at a shorter context
    set_audio_context(None, processor, seconds)

recordings = load_recordings(options.data, name, "test")
dataset, _ = prepare_dataset(recordings, processor, name)
# "loss": modules whose gate is undecided become the FFN with the lower loss on the transcripts.
frozen = freeze_routing(model, name, dataset=dataset, processor=processor, undecided="loss")
rate = frozen.before["rate"]  # "wer", or "cer" for languages without spaces between words
print(f"{rate.upper()} {frozen.before[rate]:.1%} routed, {frozen.after[rate]:.1%} frozen")

frozen.model.save_pretrained(options.output_dir)
processor.save_pretrained(options.output_dir)
processor.feature_extractor.save_pretrained(options.output_dir)  # preprocessor_config.json, for faster-whisper
