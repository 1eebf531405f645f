"""Measure an expert and the base model on a test set, and push the expert with its results to the Hub."""

import argparse

import torch
from peft import PeftModel
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from peft_clsr import error_rates, load_recordings, prepare_dataset, push_language, set_audio_context, transcribe

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="openai/whisper-base")
parser.add_argument("--adapters", default="experts", help="folder with one folder a language")
parser.add_argument("--language", default="ca")
parser.add_argument("--dataset", default="my_recordings")
parser.add_argument("--repo_id", default="me/whisper-base-experts")
options = parser.parse_args()

processor = WhisperProcessor.from_pretrained(options.model)
whisper = WhisperForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
language = options.language
model = PeftModel.from_pretrained(whisper, options.adapters, subfolder=language, adapter_name=language)
seconds = model.peft_config[language].max_audio_seconds
if seconds is not None:  # trained at a shorter context, at which the base model is measured, too
    set_audio_context(None, processor, seconds)
test_set, _ = prepare_dataset(load_recordings(options.dataset, language, "test"), processor, language)


def measure():
    transcripts = transcribe(model, processor, test_set, language, max_new_tokens=64)
    return error_rates(transcripts, test_set["text"], language=language)[language]


rates = measure()
with model.disable_adapter():
    base_rates = measure()
results = {
    "wer": rates["wer"],
    "cer": rates["cer"],
    "base_wer": base_rates["wer"],
    "base_cer": base_rates["cer"],
    "utterances": rates["utterances"],
}
commit = push_language(model, options.repo_id, language, metrics={options.dataset: results})
print(commit.commit_url)
