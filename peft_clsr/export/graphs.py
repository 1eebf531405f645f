"""Traces a Whisper with one language's experts into ONNX graphs, with transformers' exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import GenerationConfig, WhisperForConditionalGeneration

from ..extras import require
from ..inference.exported import DECODER, ENCODER
from ..whisper import FRAMES_PER_POSITION
from .merged_decoder import merge_decoder


def onnx_graphs(whisper: WhisperForConditionalGeneration) -> dict[str, Any]:
    """
    The graphs of a Whisper, gates and experts of its active adapter in them.

    Args:
        whisper (`WhisperForConditionalGeneration`): In evaluation mode, on the CPU. It may have CLSR layers.

    Returns:
        `dict[str, onnx_ir.Model]`: "encoder_model": `input_features` [batch, mel bins, frames] to
        `last_hidden_state`; "decoder_model_merged": see [`merge_decoder`]. Batch and length of the prompt are open.
    """
    check_exporter()
    from transformers.exporters import OnnxConfig, OnnxExporter

    config = whisper.config
    whisper.set_attn_implementation("eager")  # ONNX Runtime fuses its transposition of the keys into the product
    frames = FRAMES_PER_POSITION * config.max_source_positions
    features = torch.zeros(2, config.num_mel_bins, frames, dtype=whisper.dtype)
    prompt = torch.full((2, 3), config.decoder_start_token_id)
    with _quietly(), torch.no_grad():
        exporter = OnnxExporter()
        encoder = exporter.export(whisper.model.encoder, {"input_features": features}, OnnxConfig(dynamic=True))
        inputs: dict[str, Any] = {"input_features": features, "decoder_input_ids": prompt}
        # With its own one, Whisper detects the language first, and that would be traced instead of the prompt.
        own = whisper.generation_config
        whisper.generation_config = GenerationConfig.from_model_config(config)
        try:
            decoder = exporter.export_for_generation(whisper, inputs, OnnxConfig(dynamic=True)).components
        finally:
            whisper.generation_config = own
    encoder.program.graph.inputs[0].shape = require("onnx_ir").Shape(["batch", config.num_mel_bins, frames])
    heads = config.decoder_attention_heads
    graphs = {ENCODER: encoder.program}
    graphs[DECODER] = merge_decoder(
        decoder["prefill"].program, decoder["decode"].program, heads, config.d_model // heads
    )
    return graphs


def check_exporter() -> None:
    """Raise a `ModuleNotFoundError` if what the export needs is not installed."""
    for package in ("onnx", "onnx_ir", "onnxscript"):
        require(package)
    if Version(transformers.__version__) < Version("5.23.0"):
        raise ModuleNotFoundError(
            f"the export to ONNX needs transformers 5.23 or newer, and {transformers.__version__} is installed: "
            "pip install 'peft_clsr[onnx]'"
        )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Hide what the exporter prints of its progress, and its warnings of operators that Whisper does not have."""
    noisy = {logger: logger.level for logger in map(logging.getLogger, ("torch", "transformers"))}
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in noisy.items():
            logger.setLevel(level)
