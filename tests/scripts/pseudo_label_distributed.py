"""Transcribe under `accelerate launch`: `pseudo_label_distributed.py DATASET TEACHER LABELS`."""

import os
import sys

import datasets
from accelerate import PartialState
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from peft_clsr import pseudo_label

if __name__ == "__main__":
    dataset, teacher = (
        datasets.load_from_disk(sys.argv[1]),
        WhisperForConditionalGeneration.from_pretrained(sys.argv[2]),
    )
    processor = WhisperProcessor.from_pretrained(sys.argv[2])
    labels = pseudo_label(dataset, teacher, processor, "ca", output_dir=sys.argv[3], batch_size=1)
    process = PartialState()
    # One call: both processes write to one pipe.
    sys.stdout.write(f"process {process.process_index} of {process.num_processes}: {len(labels)} labels\n")
    sys.stdout.flush()
    process.wait_for_everyone()
    os._exit(0)  # as in train_distributed.py
