"""Exports a Whisper with one language's expert, gates and all, for software without PyTorch."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel
from torch import nn

from ..files import to_json, write_text
from ..inference.exported import LANGUAGE_FILE, SUFFIXES
from ..languages.adapters import adapter_prompts
from ..languages.tags import prompt_code
from . import onnx_graphs, openvino_graphs
from .adapter import check_layers, copy_with_adapter, find_adapter

_FORMATS = {"onnx": onnx_graphs, "openvino": openvino_graphs}


def export_model(
    model: PeftModel,
    language: str,
    folder: str | os.PathLike[str],
    *,
    processor: Any,
    format: Literal["onnx", "openvino"] = "onnx",
    precision: Literal["float32", "float16", "int8"] = "float32",
) -> Path:
    """
    Write graphs in which each token of one language takes the expert or the shared FFN, as in PyTorch.

    Args:
        model (`PeftModel`): A Whisper with CLSR adapters, in memory, without quantization. It is not changed.
        language (`str`): The language to keep: an adapter's name, or a language as in [`language_tag`].
        folder (`str` or `os.PathLike`):
            Gets the graphs, the configs and the processor, with the names that other software reads: graphs of ONNX
            in `onnx/`, for transformers.js, onnx-asr and Optimum; those of OpenVINO beside the configs, for OpenVINO
            GenAI. A folder of an earlier ONNX export of the same expert gains a precision.
        processor (`WhisperProcessor`): The model's.
        format (`str`, *optional*, defaults to `"onnx"`): "onnx" or "openvino"; others have no gates.
        precision (`str`, *optional*, defaults to `"float32"`):
            Of the weights: "float16" halves the files, "int8" quarters them. With int8, ONNX Runtime quantizes
            activations, too, at run time.

    Returns:
        `Path`: the folder.

    Raises:
        TypeError: `model` is no `PeftModel` around a Whisper.
        ModuleNotFoundError: the extra `onnx` or `openvino` is not installed.
        ValueError: format or precision is unknown; the language has no adapter; FFNs are quantized or not in memory;
            or the folder has other content.
    """
    if format not in _FORMATS:
        raise ValueError(
            f"format is {format!r}, expected 'onnx' or 'openvino': CTranslate2 and LoRA have no gates, so "
            "freeze_routing comes first"
        )
    if precision not in SUFFIXES:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(SUFFIXES)}")
    name, tag = find_adapter(model, language)
    check_layers(model, name)
    prompt = adapter_prompts(model.peft_config)[name] or prompt_code(tag)
    graphs = _FORMATS[format]
    graphs.check()
    whisper: Any = copy_with_adapter(model, name).get_base_model()
    about = to_json({"language": tag, "prompt_language": prompt, "weights": _fingerprint(whisper)})
    target = Path(folder)
    _check_folder(target, about, format)
    with tempfile.TemporaryDirectory() as scratch:
        unfinished = Path(scratch)
        graphs.write(whisper.cpu(), processor, unfinished, precision)
        config = whisper.generation_config
        config.language, config.task = prompt, "transcribe"
        config.save_pretrained(unfinished)
        setattr(whisper.config, "transformers.js_config", {"kv_cache_dtype": {"fp16": "float16"}})
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


def _fingerprint(whisper: nn.Module) -> str:
    """SHA-256 of all weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(whisper.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.cpu().float().numpy().tobytes())
    return found.hexdigest()


def _check_folder(folder: Path, about: str, format: str) -> None:
    """Raise a `ValueError` for a folder with content, but for an earlier ONNX export of the same expert."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if format != "onnx":
        raise ValueError(f"{folder} is not an empty folder: give another one")
    earlier = folder / LANGUAGE_FILE
    if not (folder.is_dir() and earlier.is_file() and earlier.read_text(encoding="utf-8") == about):
        raise ValueError(f"{folder} is not an empty folder, nor an export of this expert: give another one")
