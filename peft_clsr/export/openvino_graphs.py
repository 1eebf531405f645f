"""
Models of OpenVINO from a Whisper with one language's expert, by transformers' exporter.

They have the names, inputs and states that OpenVINO GenAI's `WhisperPipeline` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)
from transformers.modeling_outputs import BaseModelOutput

from ..extras import require
from ..inference.exported import ExportedExpert
from ..whisper import FRAMES_PER_POSITION
from .exporter import check_exporter, quietly

_INPUTS = {"decoder_input_ids": "input_ids", "encoder_outputs.last_hidden_state": "encoder_hidden_states"}
_CROSS_ATTENTION = ".cross_attention_cache."


def check() -> None:
    """Raise a `ModuleNotFoundError` if what the export needs is not installed."""
    for package in ("openvino", "openvino_tokenizers", "nncf"):
        require(package)
    check_exporter("openvino")


def write(whisper: WhisperForConditionalGeneration, processor: WhisperProcessor, folder: Path, precision: str) -> None:
    """
    Write encoder, decoder, tokenizer and detokenizer into a folder.

    Args:
        whisper (`WhisperForConditionalGeneration`): In evaluation mode, on the CPU. It gets the type of the weights.
        processor (`WhisperProcessor`): Its tokenizer becomes two models of OpenVINO.
        folder (`Path`): Gets the files.
        precision (`str`): "float32", "float16" or "int8", of the weights. The device chooses in what it computes.
    """
    openvino, tokenizers = require("openvino"), require("openvino_tokenizers")
    with quietly(), torch.no_grad():
        whisper.float()
        models = {"encoder_model": _encoder(whisper), "decoder_model": _decoder(whisper)}
        if precision == "int8":
            models = {name: require("nncf").compress_weights(model) for name, model in models.items()}
        models["tokenizer"], models["detokenizer"] = tokenizers.convert_tokenizer(
            processor.tokenizer, with_detokenizer=True
        )
        for name, model in models.items():
            path = folder / f"openvino_{name}.xml"
            openvino.save_model(model, path, compress_to_fp16=precision == "float16" and name.endswith("model"))


def _encoder(whisper: WhisperForConditionalGeneration) -> Any:
    """`input_features` [batch, mel bins, frames] to `last_hidden_state`."""
    frames = FRAMES_PER_POSITION * whisper.config.max_source_positions
    return _export(whisper.model.encoder, {"input_features": torch.zeros(2, whisper.config.num_mel_bins, frames)})


def _decoder(whisper: WhisperForConditionalGeneration) -> Any:
    """
    `input_ids` [batch, tokens], `encoder_hidden_states` and `beam_idx` [batch] to `logits`, with its caches as states.

    The exporter makes states of the cache that grows. The keys and values of the encoder's states are computed from
    them at the first call after a reset, which is when OpenVINO computes the first value of a state, and kept.
    """
    import openvino.opset14 as operators
    from openvino.op.util import Variable, VariableInfo

    config = whisper.config
    batch, tokens, past = 2, 3, 4  # different, so that the exporter tells the dimensions apart
    grown, heads = DynamicCache(), config.decoder_attention_heads
    for layer in range(config.decoder_layers):
        filled = torch.zeros(batch, heads, past, config.d_model // heads)
        grown.update(filled, filled, layer)
    states = torch.zeros(batch, config.max_source_positions, config.d_model)
    model = _export(
        whisper,
        {
            "decoder_input_ids": torch.zeros(batch, tokens, dtype=torch.long),
            "encoder_outputs": BaseModelOutput(last_hidden_state=states),
            "past_key_values": EncoderDecoderCache(grown, DynamicCache()),
        },
    )
    for name, new_name in _INPUTS.items():
        model.input(name).get_tensor().set_names({new_name})
    for output in model.outputs:
        name, result = output.get_any_name(), output.get_node()
        if name == "logits":
            continue
        if _CROSS_ATTENTION in name:
            computed = result.input_value(0)
            readers = [port for port in computed.get_target_inputs() if port.get_node().get_type_name() != "Result"]
            info = VariableInfo()
            info.variable_id = name
            info.data_shape, info.data_type = computed.get_partial_shape(), computed.get_element_type()
            kept = Variable(info)
            read = operators.read_value(computed, kept)
            for reader in readers:
                reader.replace_source_output(read.output(0))
            model.add_variables([kept])
            model.add_sinks([operators.assign(read, kept)])
        model.remove_result(result)
    model.validate_nodes_and_infer_types()
    return model


def _export(module: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    from transformers.exporters import OpenVINOConfig, OpenVINOExporter

    return OpenVINOExporter().export(module, inputs, OpenVINOConfig(dynamic=True)).program


def transcribe_with_genai(
    folder: Path, precision: str, waveforms: Sequence[np.ndarray], max_new_tokens: int
) -> list[str]:
    """
    Transcribe recordings greedily with OpenVINO GenAI, as [`transcribe`] does with transformers.

    Args:
        folder (`Path`): From [`export_model`].
        precision (`str`): As exported. "float32" is computed in float32; for others the CPU chooses, as by default.
        waveforms (`Sequence[np.ndarray]`): float32 [samples] of 16 kHz.
        max_new_tokens (`int`): Longest transcript in tokens.
    """
    computing = {"INFERENCE_PRECISION_HINT": "f32"} if precision == "float32" else {}
    pipeline = require("openvino_genai").WhisperPipeline(str(folder), "CPU", **computing)
    settings = {
        "language": f"<|{ExportedExpert.open(folder).prompt_language}|>",
        "task": "transcribe",
        "max_new_tokens": max_new_tokens,
    }
    bar = tqdm(waveforms, desc=f"OpenVINO, {precision}", unit="utt")
    return [pipeline.generate(waveform.tolist(), **settings).texts[0].strip() for waveform in bar]
