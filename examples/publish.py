"""
Publish the language experts of a folder on the Hub, and load one back.

    python examples/publish.py --adapters runs/with-teacher --repository me/whisper-small-experts

Log in first: `hf auth login`. `push_language` publishes one adapter of a model, with its error rates.
"""

import argparse

import torch
from transformers import WhisperForConditionalGeneration

from peft_clsr import list_languages, load_language, push_folder

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="openai/whisper-small", help="the base model of the experts")
parser.add_argument("--adapters", required=True, help="folder with one folder per language")
parser.add_argument("--repository", required=True)
options = parser.parse_args()

commit = push_folder(options.adapters, options.repository)
print(f"pushed: {commit.commit_url}")

languages = list_languages(options.repository)  # without downloading weights
for language in languages:
    print(language.code, language.name, language.base_model, language.rank, language.size, language.wer)

whisper = WhisperForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
model = load_language(whisper, options.repository, languages[0].code)
print(f"loaded: {', '.join(model.peft_config)}")
