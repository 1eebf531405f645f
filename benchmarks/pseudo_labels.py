"""
What do pseudo-labels bring? Romanian experts trained on 100 transcribed recordings, on those and 500 more that the
first expert transcribed, and on all 600 transcribed.

    python -m benchmarks.pseudo_labels --bf16 --threads 2

fetches whisper-base and recordings, and trains each expert with the recipe of the earlier demo
(docs/explanation/demo.md) and the same number of steps. The seed draws the recordings, the weights and the windows.
Each run is measured on the same held-out recordings. `--output` has a line of JSON for each finished run. Runs that
are in it are not repeated, so a stopped command goes on where it was.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import datasets
import torch
from peft import PeftModel
from transformers import WhisperForConditionalGeneration, set_seed

from benchmarks.result_lines import Results
from benchmarks.small_runs import make_parser, measure, new_expert, prepare, recordings, save_expert, train
from examples.demo.fetch import FetchError
from peft_clsr import (
    error_rates,
    filter_pseudo_labels,
    pack_utterances,
    pseudo_label,
)

DATA = ("transcribed", "pseudo-labelled", "all transcribed")
# gates that start on the expert, and may close
GATES = {"straight_through": True, "gate_noise": 0, "gate_budget": 1, "budget_weight": 0.1, "skip_gate_prob": 0}
GATES |= {"expert_dropout": 0.05}
TRAINING = {"per_device_train_batch_size": 1, "label_smoothing_factor": 0.1}
WINDOWS = {"single": 0.2, "timestamps": 0.5, "previous_text": 0.1, "no_speech": 0.05}
# The values that tell a run from others in the file of results.
KEYS = ("language", "data", "transcribed", "more", "seed", "steps", "rank", "learning_rate", "bf16", "held_out")


def main() -> None:
    options = parse_options()
    processor, held_out = prepare(options, options.language)
    results = Results(options.output, KEYS)
    common = {name: getattr(options, name) for name in KEYS if hasattr(options, name)}
    runs = [common | {"seed": seed, "data": data} for seed in options.seeds for data in DATA]
    for run in runs:
        if results.find(run):
            continue
        started = time.monotonic()
        rows, about = training_rows(run, options, processor)
        model, log = trained_expert(run, rows, options, processor)
        name = f"{run['data']}, seed {run['seed']}"
        row = run | about | measure(model, processor, held_out, run["language"], bf16=options.bf16, desc=name)
        results.add(row | {"recordings": len(rows), "log": log, "seconds": round(time.monotonic() - started)})
        print(f"{name}: WER {row['wer']:.1%}, {time.monotonic() - started:.0f} s", flush=True)
    print(table([results.find(run) for run in runs]))


def parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__, "pseudo-labels", language="ro", steps=160, rank=32)
    parser.add_argument("--transcribed", type=int, default=100, help="recordings whose transcripts are used")
    parser.add_argument("--more", type=int, default=500, help="recordings that the first expert transcribes")
    return parser.parse_args()


def training_rows(
    run: dict[str, Any], options: argparse.Namespace, processor: Any
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """The recordings of a run with the transcripts to train on, and what is to know of pseudo-labels."""
    rows = recordings(options.cache_dir, run["language"], "train").shuffle(seed=run["seed"])
    rows = rows.select(range(run["transcribed"] + run["more"])).select_columns(["audio", "transcription"])
    transcribed = rows.select(range(run["transcribed"]))
    if run["data"] == "transcribed":
        return transcribed, {}
    if run["data"] == "all transcribed":
        return rows, {}
    teacher, _ = trained_expert(run | {"data": "transcribed"}, transcribed, options, processor)
    if options.bf16:
        teacher.to(torch.bfloat16)
    more = rows.select(range(run["transcribed"], len(rows)))
    folder = options.work_dir / run_name(run) / "labels"
    labels = pseudo_label(more, teacher, processor, run["language"], output_dir=folder, batch_size=10)
    kept, hours = filter_pseudo_labels(labels)
    rates = [
        error_rates(part["transcription"][:], part["reference"][:], language=run["language"])[run["language"]]["wer"]
        for part in (labels, kept)
    ]
    rows = datasets.concatenate_datasets([transcribed, kept.select_columns(["audio", "transcription"])])
    about = {"labels": len(labels), "kept": len(kept), "hours": hours}
    return rows, about | {"wer_of_labels": rates[0], "wer_of_kept": rates[1]}


def trained_expert(
    run: dict[str, Any], rows: datasets.Dataset, options: argparse.Namespace, processor: Any
) -> tuple[PeftModel, list[dict[str, float]]]:
    """The model with the expert of a run, trained if no folder has it, and the log of its losses in this process."""
    language, folder = run["language"], options.work_dir / run_name(run) / run["language"]
    if folder.is_dir():
        whisper = WhisperForConditionalGeneration.from_pretrained(options.student, dtype=torch.float32)
        return PeftModel.from_pretrained(whisper, folder, adapter_name=language).eval(), []
    set_seed(run["seed"])
    model = new_expert(language, options.student, expert_rank=run["rank"], **GATES)
    windows = pack_utterances(rows, processor, language, seed=run["seed"], **WINDOWS)
    log = train(
        model,
        processor,
        windows,
        language,
        steps=run["steps"],
        seed=run["seed"],
        learning_rate=run["learning_rate"],
        bf16=options.bf16,
        **TRAINING,
    )
    save_expert(model, language, folder)
    return model.eval(), log


def run_name(run: dict[str, Any]) -> str:
    return "-".join(str(run[name]) for name in KEYS if name not in ("language", "held_out")).replace(" ", "-")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: for each kind of data the WER of each seed, and their mean."""
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    lines = [f"| trained on | {' | '.join(f'seed {seed}' for seed in seeds)} | mean WER % |"]
    lines.append("|---" * (len(seeds) + 2) + "|")
    for data in DATA:
        wers = [100 * row["wer"] for row in rows if row["data"] == data]
        lines.append(f"| {data} | {' | '.join(f'{wer:.1f}' for wer in wers)} | {statistics.mean(wers):.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except (FetchError, ValueError) as error:
        sys.exit(f"error: {error}")
