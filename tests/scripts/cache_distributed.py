"""Cache a teacher's states under `accelerate launch`: `cache_distributed.py DATASET TEACHER CACHE`."""

import os
import sys

import datasets
from accelerate import PartialState
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from peft_clsr import cache_teacher_states


class CountingTeacher(WhisperForConditionalGeneration):
    examples = 0

    def forward(self, input_features, **kwargs):
        self.examples += len(input_features)
        return super().forward(input_features, **kwargs)


if __name__ == "__main__":
    dataset, teacher = datasets.load_from_disk(sys.argv[1]), CountingTeacher.from_pretrained(sys.argv[2])
    processor = WhisperProcessor.from_pretrained(sys.argv[2])
    states = cache_teacher_states(dataset, teacher, processor, sys.argv[3], batch_size=2, shard_size=3)
    process = PartialState()
    line = f"process {process.process_index} of {process.num_processes}: {teacher.examples}, {len(states.dataset)}\n"
    sys.stdout.write(line)  # one call: both processes write to one pipe
    sys.stdout.flush()
    process.wait_for_everyone()
    os._exit(0)  # as in train_distributed.py
