"""Transcribe in one of several processes, which says how much in a file beside the labels."""

import datasets
from accelerate import PartialState
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from peft_clsr import pseudo_label


def main(dataset, teacher, labels):
    dataset, processor = datasets.load_from_disk(dataset), WhisperProcessor.from_pretrained(teacher)
    teacher = WhisperForConditionalGeneration.from_pretrained(teacher)
    found = pseudo_label(dataset, teacher, processor, "ca", output_dir=labels, batch_size=1)
    process = PartialState()
    line = f"process {process.process_index} of {process.num_processes}: {len(found)} labels"
    labels.with_name(f"process-{process.process_index}").write_text(line)
    process.wait_for_everyone()
