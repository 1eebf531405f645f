"""
Time one expert in each software that it can be exported for, on the same recordings, one at a time on the CPU.

    peft-clsr export --format onnx ... --precision float32 int8 --output_dir exports/ro/onnx
    peft-clsr export --format openvino ... --precision float32 int8 --output_dir exports/ro/openvino
    peft-clsr export --format ctranslate2 ... --output_dir exports/ro/frozen
    python -m benchmarks.runtimes --adapter runs/demo-ro/ro --exports exports/ro

Each round transcribes the recordings once with every software, in random order. The table has the median of seconds of
speech a second, and of the ratio to PyTorch's time within a round, with its quartiles. All decode greedily, once, to
the same number of tokens at most.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.utils import logging

from benchmarks.timing import format_ratio, ratio, time_steps
from peft_clsr import error_rates, load_recordings, read_audio
from peft_clsr.export.ctranslate2 import ONE_ATTEMPT, PROMPT_TOKENS
from peft_clsr.inference.exported import ExportedExpert
from peft_clsr.inference.onnx_whisper import OnnxWhisper

RATE = 16_000  # Hz
Transcribe = Callable[[np.ndarray], str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/whisper-base", help="base Whisper")
    parser.add_argument("--adapter", required=True, help="folder of the expert")
    parser.add_argument("--exports", type=Path, required=True, help="has onnx, openvino and frozen")
    parser.add_argument("--dataset", default=".cache/tuxpaint-ro", help="recordings; the test split")
    parser.add_argument("--limit", type=int, default=16, help="recordings")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    language = ExportedExpert.open(arguments.exports / "onnx").prompt_language
    rows = load_recordings(arguments.dataset, language, "test", limit=arguments.limit)
    waveforms = [read_audio(row["audio"], RATE) for row in rows]
    speech = sum(map(len, waveforms)) / RATE
    heard: dict[str, list[str]] = {}

    def step(name: str, transcribe: Transcribe) -> Callable[[], None]:
        def run() -> None:
            heard[name] = [transcribe(waveform) for waveform in waveforms]

        return run

    steps = {name: step(name, transcribe) for name, transcribe in softwares(arguments, language).items()}
    for run in steps.values():
        run()  # the first run compiles
    seconds = time_steps(steps, arguments.rounds)
    texts = [row["transcription"] for row in rows]
    print(f"{len(rows)} recordings, {speech:.0f} s; {arguments.rounds} rounds, {arguments.threads} threads\n")
    print("| | speech a second | time, to PyTorch's | WER % | transcripts equal PyTorch's |\n|---|---|---|---|---|")
    for name, times in seconds.items():
        equal = sum(text == other for text, other in zip(heard[name], heard["PyTorch"], strict=True))
        wer = 100 * error_rates(heard[name], texts, language=language)[language]["wer"]
        speed, times_ratio = speech / float(np.median(times)), format_ratio(ratio(seconds, name, "PyTorch"))
        print(f"| {name} | {speed:.1f} s | {times_ratio} | {wer:.1f} | {equal} of {len(rows)} |")


def softwares(arguments: argparse.Namespace, language: str) -> dict[str, Transcribe]:
    """Functions that transcribe float32 [samples] of 16 kHz, by name."""
    import openvino_genai
    from faster_whisper import WhisperModel

    threads, limit = arguments.threads, arguments.max_new_tokens
    found: dict[str, Transcribe] = {"PyTorch": with_pytorch(arguments, language)}
    for precision in ("float32", "int8"):
        whisper = OnnxWhisper(ExportedExpert.open(arguments.exports / "onnx"), precision, threads)
        found[f"ONNX Runtime, {precision}"] = lambda samples, whisper=whisper: (
            whisper.transcribe(samples, max_new_tokens=limit, **ONE_ATTEMPT).text
        )
    said = {"language": f"<|{language}|>", "task": "transcribe", "max_new_tokens": limit}
    for precision, computing in (("float32", "f32"), ("int8", "f32"), ("float32", "bf16"), ("int8", "bf16")):
        settings = {"INFERENCE_PRECISION_HINT": computing, "INFERENCE_NUM_THREADS": threads}
        folder = arguments.exports / "openvino" / precision
        pipeline = openvino_genai.WhisperPipeline(str(folder), "CPU", **settings)
        found[f"OpenVINO, {precision}, computing in {computing}"] = lambda samples, pipeline=pipeline: (
            pipeline.generate(samples.tolist(), **said).texts[0].strip()
        )
    for precision in ("float32", "int8"):  # CTranslate2 quantizes when it loads
        path = arguments.exports / "frozen" / "ctranslate2"
        frozen = WhisperModel(str(path), device="cpu", compute_type=precision, cpu_threads=threads)

        def transcribe(samples: np.ndarray, frozen: WhisperModel = frozen) -> str:
            # CTranslate2 halves this number, with the prompt.
            settings = {
                "language": language,
                "beam_size": 1,
                "max_new_tokens": 2 * limit - PROMPT_TOKENS,
                **ONE_ATTEMPT,
            }
            return "".join(segment.text for segment in frozen.transcribe(samples, **settings)[0]).strip()

        found[f"faster-whisper, frozen, {precision}"] = transcribe
    return found


def with_pytorch(arguments: argparse.Namespace, language: str) -> Transcribe:
    """transformers with the routed expert, in float32."""
    whisper = WhisperForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(whisper, arguments.adapter, adapter_name=language).eval()
    processor = WhisperProcessor.from_pretrained(arguments.model)
    settings = {"language": language, "task": "transcribe", "max_new_tokens": arguments.max_new_tokens}

    def transcribe(samples: np.ndarray) -> str:
        inputs = processor.feature_extractor(samples, sampling_rate=RATE, return_tensors="pt")
        tokens = model.generate(inputs.input_features, **settings)
        return processor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()

    return transcribe


if __name__ == "__main__":
    main()
