"""
Measure time and memory of training steps: full fine-tuning, LoRA, CLSR, CLSR with distillation; and how much speech
is trained on in a second.

    make bench-train
    python -m benchmarks.train --student openai/whisper-base --dataset my_recordings --rounds 40 --output results.json

Each method has a trainer as a user would set it up. Each round takes one step of every method on the same batch, in
random order, so that other load on the machine affects all alike; compare the ratios within a round. A step is all
that `Trainer` does for one: fetch and collate the batch, forward, backward, clip gradients, optimizer step.

A dataset is a folder with `train/metadata.csv`: columns `file_name` (relative to it), `transcription` and `language`.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.profiler import profile
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, WhisperForConditionalGeneration, WhisperProcessor
from transformers.utils import logging

from peft_clsr import (
    CLSRConfig,
    DataCollatorSpeechSeq2SeqWithPadding,
    DistillationTrainer,
    DistillationTrainingArguments,
    cache_teacher_states,
    set_audio_context,
)
from peft_clsr.distillation.losses import TeacherTargets, chunked_losses, cross_entropy_sum, distillation_sum
from peft_clsr.files import to_json

from .speech_rate import load_recordings, measure_speech_rates, prepare
from .timing import MILLION, add_clock_argument, check_bound, format_bound, format_ratio, machine, ratio, time_steps
from .training_steps import trainer_settings, training_steps

FULL, LORA, CLSR, LOW_RANK = "full fine-tuning", "LoRA, rank 32", "CLSR", "CLSR, rank 32"
LOW_RANK_BFLOAT16 = "CLSR, rank 32, bfloat16 autocast"
LIVE, CACHED = "CLSR + KD, live teacher", "CLSR + KD, cached teacher"
# Method, reference, and the expected maximum of the ratio of their times of a step.
BOUNDS = ((CLSR, LORA, 1.6), (CACHED, CLSR, 1.1))

WARMUP_ROUNDS = 1  # creates the optimizer's states


def build_trainers(
    base: WhisperForConditionalGeneration,
    processor: Any,
    dataset: datasets.Dataset,
    batch_size: int,
    folder: str,
    with_bfloat16: bool,
) -> dict[str, Seq2SeqTrainer]:
    """A trainer for each method, with its own copy of the student. Teachers are the unchanged base."""
    language = dataset["language"][0]
    settings = trainer_settings(folder, batch_size)

    def plain(model: nn.Module) -> Seq2SeqTrainer:
        return Seq2SeqTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(**settings),
            train_dataset=dataset.remove_columns("language"),  # Whisper's forward takes none
            data_collator=DataCollatorSpeechSeq2SeqWithPadding(processor),
        )

    def clsr(
        train_dataset: datasets.Dataset = dataset, teacher: Any = None, bf16: bool = settings["bf16"], **config: Any
    ) -> DistillationTrainer:
        model = get_peft_model(copy.deepcopy(base), CLSRConfig.paper(language, **config), adapter_name=language)
        model.base_model.set_gate_progress(0.5)  # the middle of training: gates are noisy
        return DistillationTrainer(
            model=model,
            args=DistillationTrainingArguments(**settings | {"bf16": bf16}),
            teacher_model=teacher,
            train_dataset=train_dataset,
            data_collator=DataCollatorSpeechSeq2SeqWithPadding(processor),
            processing_class=processor,
        )

    cached = cache_teacher_states(dataset, copy.deepcopy(base), processor, Path(folder) / "states")
    lora = LoraConfig(r=32, target_modules=["fc1", "fc2"])
    trainers = {
        FULL: plain(copy.deepcopy(base)),
        LORA: plain(get_peft_model(copy.deepcopy(base), lora)),
        CLSR: clsr(),
        LOW_RANK: clsr(expert_rank=32),
        LIVE: clsr(teacher=copy.deepcopy(base)),
        CACHED: clsr(train_dataset=cached.dataset, teacher=cached),
    }
    if with_bfloat16:
        trainers[LOW_RANK_BFLOAT16] = clsr(expert_rank=32, bf16=True)
    return trainers


def peak_bytes(run: Callable[[], Any]) -> int:
    """Peak memory of the tensors that `run` creates, without those that existed before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as profiler:
        run()
    # The CPU's allocator has no peak counter, but reports each allocation and release to the profiler.
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def held_bytes(trainer: Seq2SeqTrainer) -> int:
    """Memory that a method keeps between steps: weights, optimizer states, and the teacher or its output layer."""
    modules = [trainer.model]
    teacher = getattr(trainer, "teacher_model", None)
    if teacher is not None:
        modules.append(teacher if isinstance(teacher, nn.Module) else teacher.output_layer)
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    tensors += [value for state in trainer.optimizer.state.values() for value in state.values()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def kd_bytes(output_weight: torch.Tensor, positions: int) -> dict[str, int]:
    """
    Memory that KD adds to cross-entropy, forward and backward, from decoder states at `positions` labels: in chunks,
    as the trainer computes the losses, and with the same formulas on whole logits.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary, hidden = output_weight.shape
    states, teacher_states = torch.randn(2, positions, hidden, generator=generator).to(output_weight)
    labels = torch.randint(vocabulary, (positions,), generator=generator).to(output_weight.device)
    teacher_output = nn.Linear(hidden, vocabulary, bias=False, device="meta")
    teacher_output.weight = nn.Parameter(output_weight.clone(), requires_grad=False)

    def chunked(kd_weight: float) -> None:
        targets = TeacherTargets(teacher_states, teacher_output)
        student = states.clone().requires_grad_()
        chunked_losses(student, output_weight, None, labels, targets, kd_weight=kd_weight)[0].backward()

    def plain(kd_weight: float) -> None:
        student = states.clone().requires_grad_()
        logits = F.linear(student, output_weight)
        loss = cross_entropy_sum(logits, labels)
        if kd_weight:
            loss = loss + kd_weight * distillation_sum(logits, teacher_output(teacher_states), labels)
        loss.backward()

    return {
        name: peak_bytes(lambda run=run: run(2.0)) - peak_bytes(lambda run=run: run(0.0))
        for name, run in (("in chunks", chunked), ("whole logits", plain))
    }


def format_results(results: dict[str, Any]) -> str:
    """Tables in Markdown."""

    lines = [
        ", ".join(f"{name} {value}" for name, value in (results["machine"] | results["settings"]).items()),
        "",
        "| method | step, s | to LoRA | to CLSR | trained, M | kept, MB | a step's peak, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, row in results["methods"].items():
        counts = (row[name] / MILLION for name in ("trained_parameters", "held_bytes", "peak_bytes"))
        trained, held, peak = (f"{count:,.1f}" for count in counts)
        times = f"{row['seconds']:.2f} | {format_ratio(row['to_lora'])} | {format_ratio(row['to_clsr'])}"
        lines.append(f"| {method} | {times} | {trained} | {held} | {peak} |")
    added = {name: value / MILLION for name, value in results["kd_bytes"].items()}
    shape = " x ".join(map(str, results["settings"]["kd_labels"]))
    lines += [
        "",
        f"KD at {shape} labels adds {added['in chunks']:,.0f} MB in chunks, "
        f"{added['whole logits']:,.0f} MB on whole logits.",
        *map(format_bound, results["bounds"]),
        "",
        "| utterances of speech | a step hears | step, s | speech trained on per second of computing, s |",
        "|---|---|---|---|",
    ]
    for name, row in results["speech_rates"].items():
        lines.append(f"| {name} | {row['batch']} | {row['seconds']:.2f} | {row['speech_per_second']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--student", default=".cache/whisper-base", help="Whisper to train: folder or Hub id")
    parser.add_argument("--dataset", default=".cache/tuxpaint-ro", help="folder of recordings in one language")
    parser.add_argument("--audio_seconds", type=float, default=4.0, help="context of student and teacher")
    parser.add_argument("--batch_size", type=int, default=8, help="examples a step")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each method")
    add_clock_argument(parser)
    parser.add_argument(
        "--with_bfloat16",
        action="store_true",
        help=f"time {LOW_RANK_BFLOAT16!r} too; slow on CPUs without bfloat16 instructions",
    )
    parser.add_argument(
        "--kd_labels", type=int, nargs=2, default=[16, 128], help="batch size and tokens for KD's memory"
    )
    parser.add_argument("--output", type=Path, default=Path("results/train.json"), help="where results are written")
    arguments = parser.parse_args()
    logging.set_verbosity_error()

    processor = WhisperProcessor.from_pretrained(arguments.student)
    base = WhisperForConditionalGeneration.from_pretrained(arguments.student, dtype=torch.float32)
    set_audio_context(base, processor, arguments.audio_seconds)
    num_batches = WARMUP_ROUNDS + arguments.rounds + 1  # one for the memory
    dataset = prepare(load_recordings(arguments.dataset), processor, num_batches * arguments.batch_size)

    with tempfile.TemporaryDirectory() as folder:
        trainers = build_trainers(base, processor, dataset, arguments.batch_size, folder, arguments.with_bfloat16)
        generators = {method: training_steps(trainer) for method, trainer in trainers.items()}
        steps = {method: lambda generator=generator: next(generator) for method, generator in generators.items()}
        time_steps(steps, WARMUP_ROUNDS)
        clock = time.process_time if arguments.cpu_time else time.perf_counter
        seconds = time_steps(steps, arguments.rounds, clock)
        peaks = {}
        for method, step in steps.items():
            torch.manual_seed(0)  # as above
            peaks[method] = peak_bytes(step)
    rates = measure_speech_rates(
        arguments.student, arguments.dataset, arguments.audio_seconds, arguments.batch_size, arguments.rounds, clock
    )

    results = {
        "machine": machine("bfloat16 autocast" if torch.cuda.is_available() else "float32"),
        "settings": {
            "student": arguments.student,
            "audio_seconds": arguments.audio_seconds,
            "batch_size": arguments.batch_size,
            "labels_per_batch": sum(map(len, dataset["labels"])) / num_batches,
            "rounds": arguments.rounds,
            "clock": "CPU time" if arguments.cpu_time else "wall",
            "kd_labels": arguments.kd_labels,
        },
        "methods": {
            method: {
                "seconds": float(np.median(seconds[method])),
                "to_lora": ratio(seconds, method, LORA),
                "to_clsr": ratio(seconds, method, CLSR),
                "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
                "held_bytes": held_bytes(trainer),
                "peak_bytes": peaks[method],
                "all_seconds": seconds[method],
            }
            for method, trainer in trainers.items()
        },
        "kd_bytes": kd_bytes(
            base.proj_out.weight.detach().to(trainers[CLSR].args.device), math.prod(arguments.kd_labels)
        ),
    }
    results["speech_rates"] = rates
    results["bounds"] = [
        check_bound(ratio(seconds, method, reference)["median"], method, reference, at_most)
        for method, reference, at_most in BOUNDS
    ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(to_json(results), encoding="utf-8")
    print(format_results(results))
    print(f"results: {arguments.output}")


if __name__ == "__main__":
    main()
