"""Graphs of ONNX from a Whisper with one language's expert, by transformers' exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, WhisperForConditionalGeneration, WhisperProcessor

from ..extras import require
from ..inference.exported import DECODER, ENCODER, GRAPHS_FOLDER, graph_file
from ..whisper import FRAMES_PER_POSITION
from .exporter import check_exporter, quietly
from .merged_decoder import merge_decoder

_MOST_IN_ONE_FILE = 1_900_000_000  # bytes of weights; a file of ONNX ends at 2 GB


def check() -> None:
    """Raise a `ModuleNotFoundError` if what the export needs is not installed."""
    for package in ("onnx", "onnx_ir", "onnxscript"):
        require(package)
    check_exporter("onnx")


def write(whisper: WhisperForConditionalGeneration, processor: WhisperProcessor, folder: Path, precision: str) -> None:
    """
    Write encoder and decoder into `onnx/` of a folder.

    Args:
        whisper (`WhisperForConditionalGeneration`): In evaluation mode, on the CPU. It gets the type of the weights.
        processor (`WhisperProcessor`): Not used: other software reads it as it is.
        folder (`Path`): Gets the folder `onnx`.
        precision (`str`): "float32", "float16" or "int8".
    """
    whisper = whisper.half() if precision == "float16" else whisper.float()
    graphs = folder / GRAPHS_FOLDER
    graphs.mkdir()
    for name, graph in _trace(whisper).items():
        if precision == "float16":
            _keep_float32(graph.graph)
        _save(graph, graphs / graph_file(name, precision), precision)


def _trace(whisper: WhisperForConditionalGeneration) -> dict[str, Any]:
    """
    The graphs of a Whisper, gates and experts of its active adapter in them.

    Args:
        whisper (`WhisperForConditionalGeneration`): In evaluation mode, on the CPU. It may have CLSR layers.

    Returns:
        `dict[str, onnx_ir.Model]`: "encoder_model": `input_features` [batch, mel bins, frames] to
        `last_hidden_state`; "decoder_model_merged": see [`merge_decoder`]. Batch and length of the prompt are open.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    config = whisper.config
    whisper.set_attn_implementation("eager")  # ONNX Runtime fuses its transposition of the keys into the product
    frames = FRAMES_PER_POSITION * config.max_source_positions
    features = torch.zeros(2, config.num_mel_bins, frames, dtype=whisper.dtype)
    prompt = torch.full((2, 3), config.decoder_start_token_id)
    with quietly(), torch.no_grad():
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


def _keep_float32(graph: Any) -> None:
    """Let features and logits of a graph in float16 be float32, as transformers.js has them. Caches stay float16."""
    ir = require("onnx_ir")
    floats = ir.TensorType(ir.DataType.FLOAT)
    for value in graph.inputs:
        if value.name == "input_features":
            users = list(value.uses())
            value.type = floats
            half = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT16})
            graph.insert_before(graph[0], half)
            for user, place in users:
                user.replace_input_with(place, half.outputs[0])
    for place, value in enumerate(graph.outputs):
        if value.name == "logits":
            result = ir.Value(name="logits", type=floats, shape=value.shape)
            value.name = "logits.float16"
            graph.append(ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}, outputs=[result]))
            graph.outputs[place] = result


def _save(graph: Any, path: Path, precision: str) -> None:
    """Write a graph; one of several gigabytes gets a second file, as a file of ONNX ends at 2 GB."""
    ir = require("onnx_ir")
    if precision == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        unquantized = path.with_suffix(".float32.onnx")
        _save(graph, unquantized, "float32")
        settings = {"op_types_to_quantize": ["MatMul", "Gather"], "extra_options": {"EnableSubgraph": True}}
        quantize_dynamic(unquantized, path, weight_type=QuantType.QInt8, **settings)
        for file in unquantized.parent.glob(f"{unquantized.name}*"):
            file.unlink()
        return
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    external = {"external_data": f"{path.name}_data"} if size > _MOST_IN_ONE_FILE else {}
    ir.save(graph, path, **external)
