"""
How well do teachers know the recordings that they teach?

    python -m benchmarks.evidence.teachers

A teacher that predicts transcripts almost without error where it teaches, and not elsewhere, has them by heart. This
measures each teacher whose weights are there, that of the grid (`run.py`) and the one that shares no recording with
its student (`few.py`), on the first recordings of its student's training and of the fold's test. A measurement is a
line in `teachers.jsonl`, beside the tables of results.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

import datasets
import torch
from torch import nn
from transformers import WhisperProcessor

from benchmarks.comparison.compare import add_setup_arguments, make_setup
from benchmarks.comparison.experiment import DEVICE, load_split, load_teacher, prepare_process
from benchmarks.comparison.folds import FOLDS
from benchmarks.comparison.methods import FINETUNED, HELD_OUT
from benchmarks.comparison.runs import Run, held_out_teacher, teacher_run
from peft_clsr import DataCollatorSpeechSeq2SeqWithPadding

from .few_runs import SPLITS as LANGUAGES
from .few_runs import untaught
from .grid import Grid
from .teacher_table import RECORDINGS, SPLITS, results_of

BATCH = 10


def teacher_of(student: Run, name: str) -> Run:
    """The run that trained a teacher."""
    return held_out_teacher(student) if name == HELD_OUT else teacher_run(student.max_steps, student.fold)


@torch.no_grad()
def known_tokens(model: nn.Module, processor: Any, rows: datasets.Dataset) -> dict[str, int]:
    """
    Count the tokens of transcripts, and those that a model predicts, given the ones before them.

    Args:
        model (`nn.Module`): A Whisper.
        processor: Its processor.
        rows (`datasets.Dataset`): Prepared recordings.

    Returns:
        `dict`: "tokens" and "predicted".
    """
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor)
    special = torch.tensor(processor.tokenizer.all_special_ids, device=DEVICE)
    counts = {"tokens": 0, "predicted": 0}
    for start in range(0, len(rows), BATCH):
        batch = collator([rows[place] for place in range(start, min(start + BATCH, len(rows)))])
        labels = batch["labels"].to(DEVICE)
        features = batch["input_features"].to(DEVICE, model.dtype)
        predicted = model(input_features=features, labels=labels).logits.argmax(dim=-1)
        text = (labels >= 0) & ~torch.isin(labels, special)
        counts["tokens"] += int(text.sum())
        counts["predicted"] += int((predicted == labels)[text].sum())
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_setup_arguments(parser, "evidence", "benchmarks/results/evidence")
    arguments = parser.parse_args()
    setup = make_setup(parser, arguments)
    grid, results = Grid(setup.store, max_steps=arguments.max_steps), results_of(setup.store)
    prepare_process(setup, 0)
    processor = WhisperProcessor.from_pretrained(setup.student)
    for fold in range(FOLDS):
        for name in (FINETUNED, HELD_OUT):
            for language in LANGUAGES:
                student = untaught(grid, language, fold)
                made = teacher_of(student, name)
                keys = {"teacher": name, "language": language, "fold": fold, "run": made.key}
                missing = [split for split in SPLITS if results.find(keys | {"split": split}) is None]
                if not missing or not setup.store.weights(made).exists():
                    continue
                model, _ = load_teacher(replace(student, teacher=name), setup)
                for split in missing:
                    rows = load_split(setup, language, split, processor, RECORDINGS, fold)
                    counts = known_tokens(model.eval(), processor, rows)
                    results.add(keys | {"split": split, "precision": setup.precision} | counts)
                    share = counts["predicted"] / counts["tokens"]
                    print(f"{name} {language} {fold} {split}: {share:.1%}", flush=True)
    print(f"results: {results.path}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
