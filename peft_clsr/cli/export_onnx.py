"""`peft-clsr export --format onnx`: graphs with the gates, and their error rates beside PyTorch's."""

from __future__ import annotations

import argparse
from typing import Any

from tqdm import tqdm

from ..evaluation.transcripts import transcribe
from ..export.export_model import export_model
from ..inference.exported import ExportedExpert
from ..inference.onnx_whisper import OnnxWhisper
from .export_inputs import load_inputs


def export(arguments: argparse.Namespace) -> int:
    """Write the graphs of each precision, transcribe with them, and print the error rates. Returns 0."""
    inputs = load_inputs(arguments, lambda *_: None)
    expected = transcribe(inputs.model, inputs.processor, inputs.dataset, inputs.code, **inputs.limits)
    rows: list[tuple[str, dict[str, Any]]] = [("with the expert, PyTorch", inputs.rates(expected))]
    lines = []
    # One attempt without times, as `transcribe` does, so that only the graphs differ.
    settings: dict[str, Any] = {
        "without_timestamps": True,
        "temperature": 0,
        "max_new_tokens": arguments.max_new_tokens,
    }
    settings |= dict.fromkeys(("compression_ratio_threshold", "log_prob_threshold", "no_speech_threshold"))
    for precision in dict.fromkeys(arguments.precision):
        folder = export_model(
            inputs.model, inputs.code, arguments.output_dir, processor=inputs.processor, precision=precision
        )
        whisper = OnnxWhisper(ExportedExpert.open(folder), precision)
        name = f"ONNX Runtime, {precision}"
        heard = [whisper.transcribe(waveform, **settings).text for waveform in tqdm(inputs.waveforms(), desc=name)]
        rows.append((name, inputs.rates(heard)))
        equal = sum(text == other for text, other in zip(heard, expected, strict=True))
        lines.append(f"{equal} of {len(expected)} transcripts of {name} equal those of PyTorch")
    print(inputs.rates_table(rows))
    print("\n".join(lines))
    print(f"the graphs: {arguments.output_dir}; peft-clsr transcribe --runtime onnx --model {arguments.output_dir}")
    return 0
