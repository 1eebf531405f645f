"""Exports a Whisper with one language's expert, gates and all, for software without PyTorch."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel

from ..extras import require
from ..files import to_json, write_text
from ..inference.exported import GRAPHS_FOLDER, LANGUAGE_FILE, SUFFIXES, graph_file
from ..languages.adapters import adapter_prompts
from ..languages.tags import prompt_code
from .adapter import check_layers, copy_with_adapter, find_adapter
from .graphs import check_exporter, onnx_graphs

_MOST_IN_ONE_FILE = 1_900_000_000  # bytes of weights; a file of ONNX ends at 2 GB


def export_model(
    model: PeftModel,
    language: str,
    folder: str | os.PathLike[str],
    *,
    processor: Any,
    format: Literal["onnx"] = "onnx",
    precision: Literal["float32", "float16", "int8"] = "float32",
) -> Path:
    """
    Write graphs in which each token of one language takes the expert or the shared FFN, as in PyTorch.

    Args:
        model (`PeftModel`): A Whisper with CLSR adapters, in memory, without quantization. It is not changed.
        language (`str`): The language to keep: an adapter's name, or a language as in [`language_tag`].
        folder (`str` or `os.PathLike`):
            Gets the graphs in `onnx/`, with the names that transformers.js, onnx-asr and Optimum read, and beside them
            the configs and the processor. A folder of an earlier export of the same language gains a precision.
        processor (`WhisperProcessor`): The model's.
        format (`str`, *optional*, defaults to `"onnx"`): The only one that keeps the gates.
        precision (`str`, *optional*, defaults to `"float32"`):
            "float16" halves the files; int8 weights, with activations quantized at run time, quarter them.

    Returns:
        `Path`: the folder.

    Raises:
        TypeError: `model` is no `PeftModel` around a Whisper.
        ModuleNotFoundError: the extra `onnx` is not installed.
        ValueError: format or precision is unknown; the language has no adapter; FFNs are quantized or not in memory;
            or the folder has other content.
    """
    if format != "onnx":
        raise ValueError(
            f"format is {format!r}, expected 'onnx': CTranslate2 and LoRA have no gates, so freeze_routing comes first"
        )
    if precision not in SUFFIXES:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(SUFFIXES)}")
    name, tag = find_adapter(model, language)
    check_layers(model, name)
    prompt = adapter_prompts(model.peft_config)[name] or prompt_code(tag)
    about = to_json({"language": tag, "prompt_language": prompt})
    target = Path(folder)
    _check_folder(target, about)
    check_exporter()
    whisper: Any = copy_with_adapter(model, name).get_base_model()
    whisper = whisper.to("cpu", torch.float16 if precision == "float16" else torch.float32)
    with tempfile.TemporaryDirectory() as scratch:
        unfinished = Path(scratch)
        graphs = unfinished / GRAPHS_FOLDER
        graphs.mkdir()
        for graph_name, graph in onnx_graphs(whisper).items():
            _save(graph, graphs / graph_file(graph_name, precision), precision)
        config = whisper.generation_config
        config.language, config.task = prompt, "transcribe"
        config.save_pretrained(unfinished)
        whisper.config.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        processor.feature_extractor.save_pretrained(unfinished)  # preprocessor_config.json
        processor.tokenizer.save_vocabulary(str(unfinished))  # this and the next for onnx-asr
        write_text(unfinished / "added_tokens.json", to_json(processor.tokenizer.get_added_vocab()))
        write_text(unfinished / LANGUAGE_FILE, about)
        target.mkdir(parents=True, exist_ok=True)
        for part in unfinished.iterdir():  # not the folder itself, which only its owner can read
            if part.is_dir():
                shutil.copytree(part, target / part.name, dirs_exist_ok=True)
            else:
                shutil.copy(part, target / part.name)
    return target


def _check_folder(folder: Path, about: str) -> None:
    """Raise a `ValueError` for a folder with other content than an earlier export of the same language."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    earlier = folder / LANGUAGE_FILE
    if not (folder.is_dir() and earlier.is_file() and earlier.read_text(encoding="utf-8") == about):
        raise ValueError(f"{folder} is not an empty folder, nor an export of this language: give another one")


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
