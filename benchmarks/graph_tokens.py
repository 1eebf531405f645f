"""
Do exported graphs give PyTorch's tokens? transformers decodes greedily with both, on real recordings.

    python -m benchmarks.graph_tokens --export exports/ro --adapter runs/demo-ro/ro

The recordings are the demo's, one by one and joined to recordings of about a minute with 0.4 s between them, with
timestamps. It prints how many have the same tokens, and the time that each took.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.utils import logging

from benchmarks.ort_whisper import ort_whisper
from peft_clsr import load_recordings, read_audio
from peft_clsr.inference.exported import ExportedExpert

RATE = 16_000  # Hz
SECONDS, GAP = 60.0, 0.4  # of a joined recording, and after each utterance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/whisper-base", help="base Whisper")
    parser.add_argument("--adapter", required=True, help="folder of the expert")
    parser.add_argument("--export", type=Path, required=True, help="folder of its graphs")
    parser.add_argument("--dataset", default=".cache/tuxpaint-ro", help="recordings; the test split")
    parser.add_argument("--precision", default="float32", help="of the graphs")
    parser.add_argument("--limit", type=int, help="recordings; all by default")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    expert = ExportedExpert.open(arguments.export)
    whisper = WhisperForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
    routed = PeftModel.from_pretrained(whisper, arguments.adapter, adapter_name=expert.language).eval()
    graphs = ort_whisper(expert, arguments.precision, arguments.threads)
    processor = WhisperProcessor.from_pretrained(arguments.model)
    rows = load_recordings(arguments.dataset, expert.language, "test", limit=arguments.limit)
    single = [read_audio(row["audio"], RATE) for row in rows]
    for name, waveforms in (("single", single), ("joined", join(single))):
        equal, seconds = 0, {"PyTorch": 0.0, "graphs": 0.0}
        for waveform in tqdm(waveforms, desc=name):
            tokens = {}
            for kind, model in (("PyTorch", routed), ("graphs", graphs)):
                inputs = processor.feature_extractor(
                    waveform,
                    sampling_rate=RATE,
                    return_tensors="pt",
                    return_attention_mask=True,
                    truncation=False,
                    padding="max_length" if len(waveform) <= 30 * RATE else "longest",
                )
                start = time.perf_counter()
                tokens[kind] = model.generate(
                    **inputs, language=expert.prompt_language, task="transcribe", return_timestamps=True
                )
                seconds[kind] += time.perf_counter() - start
            equal += torch.equal(tokens["PyTorch"], tokens["graphs"])
        times = ", ".join(f"{kind} {value:.0f} s" for kind, value in seconds.items())
        print(f"{name}: {equal} of {len(waveforms)} recordings have the same tokens; {times}", flush=True)


def join(waveforms: list[np.ndarray]) -> list[np.ndarray]:
    """Recordings of about a minute, of utterances in their order."""
    gap = np.zeros(round(GAP * RATE), dtype=np.float32)
    joined: list[list[np.ndarray]] = [[]]
    for waveform in waveforms:
        if sum(map(len, joined[-1])) + len(waveform) > SECONDS * RATE:
            joined.append([])
        joined[-1] += [waveform, gap]
    return [np.concatenate(parts) for parts in joined]


if __name__ == "__main__":
    main()
