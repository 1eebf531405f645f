"""Cache a teacher's states in one of several processes, which says what it did in a file beside the cache."""

import datasets
from accelerate import PartialState
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from peft_clsr import cache_teacher_states


class CountingTeacher(WhisperForConditionalGeneration):
    examples = 0

    def forward(self, input_features, **kwargs):
        self.examples += len(input_features)
        return super().forward(input_features, **kwargs)


def main(dataset, teacher, cache):
    dataset, processor = datasets.load_from_disk(dataset), WhisperProcessor.from_pretrained(teacher)
    teacher = CountingTeacher.from_pretrained(teacher)
    states = cache_teacher_states(dataset, teacher, processor, cache, batch_size=2, shard_size=3)
    process = PartialState()
    line = f"process {process.process_index} of {process.num_processes}: {teacher.examples}, {len(states.dataset)}"
    cache.with_name(f"process-{process.process_index}").write_text(line)
    process.wait_for_everyone()
