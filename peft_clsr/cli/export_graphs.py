"""`peft-clsr export --format onnx|openvino`: graphs with the gates, and their error rates beside PyTorch's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..evaluation.transcripts import transcribe
from ..export.ctranslate2 import ONE_ATTEMPT
from ..export.export_model import export_model
from ..export.openvino_graphs import transcribe_with_genai
from ..inference.exported import ExportedExpert
from ..inference.onnx_whisper import OnnxWhisper
from .export_inputs import load_inputs


def export(arguments: argparse.Namespace) -> int:
    """Write the graphs of each precision, transcribe with them, and print the error rates. Returns 0."""
    inputs = load_inputs(arguments, lambda *_: None)
    expected = transcribe(inputs.model, inputs.processor, inputs.dataset, inputs.code, **inputs.limits)
    rows: list[tuple[str, dict[str, Any]]] = [("with the expert, PyTorch", inputs.rates(expected))]
    lines, waveforms = [], inputs.waveforms()
    for precision in dict.fromkeys(arguments.precision):
        if arguments.format == "onnx":  # all in one folder
            name, folder, run = "ONNX Runtime", arguments.output_dir, _transcribe_with_onnx
        else:
            name, folder, run = "OpenVINO", arguments.output_dir / precision, transcribe_with_genai
        settings = {"processor": inputs.processor, "format": arguments.format, "precision": precision}
        export_model(inputs.model, inputs.code, folder, **settings)
        heard = run(folder, precision, waveforms, arguments.max_new_tokens)
        name = f"{name}, {precision}"
        rows.append((name, inputs.rates(heard)))
        equal = sum(text == other for text, other in zip(heard, expected, strict=True))
        lines.append(f"{equal} of {len(expected)} transcripts of {name} equal those of PyTorch")
    print(inputs.rates_table(rows))
    print("\n".join(lines))
    print(f"the graphs: {arguments.output_dir}")
    if arguments.format == "onnx":
        print(f"transcribe with them: peft-clsr transcribe --runtime onnx --model {arguments.output_dir}")
    return 0


def _transcribe_with_onnx(
    folder: Path, precision: str, waveforms: Sequence[np.ndarray], max_new_tokens: int
) -> list[str]:
    """Transcribe greedily, as `transcribe` does, so that only the graphs differ."""
    whisper = OnnxWhisper(ExportedExpert.open(folder), precision)
    bar = tqdm(waveforms, desc=f"ONNX Runtime, {precision}", unit="utt")
    return [whisper.transcribe(waveform, max_new_tokens=max_new_tokens, **ONE_ATTEMPT).text for waveform in bar]
