"""Optional dependencies, and the extra that installs each."""

from __future__ import annotations

import importlib
from typing import Any

_EXTRAS = {
    "av": "train",
    "charset_normalizer": "train",
    "datasets": "train",
    "jiwer": "train",
    "praatio": "train",
    "pysubs2": "train",
    "soundfile": "train",
    "soxr": "train",
    "matplotlib": "plots",
    "ctranslate2": "export",
    "faster_whisper": "export",
    "silero_vad": "vad",
    "datacollective": "mdc",
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "nncf": "openvino",
    "openvino": "openvino",
    "openvino_genai": "openvino",
    "openvino_tokenizers": "openvino",
    "fastapi": "serve",
    "gradio": "app",
    "python_multipart": "serve",
    "ray": "serve",
}


def require(name: str) -> Any:
    """
    Import an optional dependency.

    Args:
        name (`str`): The module, such as "jiwer" or "matplotlib.figure".

    Raises:
        ModuleNotFoundError: it is not installed; the message has the command that installs it.
    """
    package = name.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise  # something else is missing in it
        extra = _EXTRAS[package]
        raise ModuleNotFoundError(
            f"{package} is not installed: pip install 'peft_clsr[{extra}]'", name=package
        ) from error
