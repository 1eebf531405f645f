"""
Does a warm start pay? Catalan experts that start as a copy of a Romanian one (warm) or from whisper-base alone (cold).

    python -m benchmarks.warm_start --bf16

fetches whisper-base and recordings, trains one Romanian expert, and then the grid: sizes x seeds x starts, each with
the same steps on windows of packed utterances. Each run is measured on the same held-out Catalan recordings.
`--output` has a line of JSON for each finished run. Runs that are in it are not repeated, so a stopped command goes on
where it was. At size 0 nothing is trained: the base model, and the Romanian expert as it is. A run takes 5 minutes of
one core.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import set_seed

from benchmarks.result_lines import Results
from benchmarks.small_runs import make_parser, measure, new_expert, prepare, recordings, save_expert, train
from examples.demo.fetch import FetchError
from peft_clsr import pack_utterances, warm_start

STARTS = ("cold", "warm")
# Those of the committed results, whatever the defaults become.
GATES = {"straight_through": True, "gate_noise": 5.0, "gate_budget": 0.75, "skip_gate_prob": 0.0}
GATES |= {"expert_dropout": 0.05}
BATCH_SIZE = 2  # windows of 30 s
# The values that tell a run from others in the file of results.
KEYS = ("language", "source", "start", "size", "seed", "steps", "source_steps", "rank", "learning_rate")
KEYS += ("bf16", "held_out")


def main() -> None:
    options = parse_options()
    processor, held_out = prepare(options, options.source, options.language)
    results = Results(options.output, KEYS)
    for run in runs(options):
        if results.find(run):
            continue
        source = source_expert(options, processor) if run["start"] == "warm" else None
        name = f"{run['start']}, {run['size']} recordings, seed {run['seed']}"
        started = time.monotonic()
        set_seed(run["seed"])  # the draws of both starts are the same
        model = expert(run["language"], options)
        if source is not None:
            warm_start(model, run["language"], source)
        log = train_on(model, run["language"], run["size"], run["steps"], run["seed"], options, processor)
        row = run | measure(model, processor, held_out, run["language"], bf16=options.bf16, desc=name) | {"log": log}
        results.add(row | {"seconds": round(time.monotonic() - started)})
        print(f"{name}: WER {row['wer']:.1%}, {time.monotonic() - started:.0f} s")
    print(table([results.find(run) for run in runs(options)]))


def parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__, "warm-start", language="ca", steps=40, rank=64)
    parser.add_argument("--source", default="ro", help="language to start from")
    parser.add_argument("--sizes", nargs="+", type=int, default=[50, 100, 200], help="recordings to train on")
    parser.add_argument("--source_steps", type=int, default=100, help="steps of the expert to start from")
    return parser.parse_args()


def runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All runs of the grid, the seeds outside, so that a part of it is a fair comparison already."""
    common = {name: getattr(options, name) for name in KEYS if hasattr(options, name)}
    for start in STARTS:
        yield common | {"start": start, "size": 0, "seed": options.seeds[0], "steps": 0}
    for seed in options.seeds:
        for size in options.sizes:
            for start in STARTS:
                yield common | {"start": start, "size": size, "seed": seed}


def source_expert(options: argparse.Namespace, processor: Any) -> Path:
    """The folder of the expert to start from. It is trained on all recordings of its language, once."""
    name = f"{options.source}-{options.source_steps}-rank{options.rank}-{options.learning_rate:g}"
    folder = options.work_dir / name / options.source
    if not folder.is_dir():
        set_seed(0)
        model = expert(options.source, options)
        train_on(model, options.source, None, options.source_steps, 0, options, processor)
        save_expert(model, options.source, folder)
    return folder


def expert(language: str, options: argparse.Namespace) -> PeftModel:
    return new_expert(language, options.student, expert_rank=options.rank, **GATES)


def train_on(
    model: PeftModel,
    language: str,
    size: int | None,
    steps: int,
    seed: int,
    options: argparse.Namespace,
    processor: Any,
) -> list[dict[str, float]]:
    """Train on `size` recordings, drawn by the seed; on all, if it is `None`. Returns the log of losses."""
    if steps == 0:
        return []
    rows = recordings(options.cache_dir, language, "train")
    if size is not None:
        rows = rows.shuffle(seed=seed).select(range(size))  # smaller sizes are parts of larger ones
    return train(
        model,
        processor,
        pack_utterances(rows, processor, language, seed=seed),
        language,
        steps=steps,
        seed=seed,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=BATCH_SIZE,
        bf16=options.bf16,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: by size the mean WER of each start, and the mean, lowest and highest difference over seeds."""
    lines = ["| recordings | cold WER % | warm WER % | warm - cold: mean (lowest to highest) |", "|---|---|---|---|"]
    for size in dict.fromkeys(row["size"] for row in rows):
        wers = {
            start: {row["seed"]: 100 * row["wer"] for row in rows if (row["size"], row["start"]) == (size, start)}
            for start in STARTS
        }
        cold, warm = wers["cold"], wers["warm"]
        differences = [warm[seed] - cold[seed] for seed in cold]
        means = [statistics.mean(values) for values in (cold.values(), warm.values(), differences)]
        bounds = f"({min(differences):+.1f} to {max(differences):+.1f})"
        lines.append(f"| {size} | {means[0]:.1f} | {means[1]:.1f} | {means[2]:+.1f} {bounds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except (FetchError, ValueError) as error:
        sys.exit(f"error: {error}")
