"""The folder of an exported expert: graphs of a precision, and the language."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..files import read_json

ENCODER, DECODER = "encoder_model", "decoder_model_merged"  # Optimum's names, which other software looks for
# What follows the name of a graph, by precision, as in the Hub's folders for transformers.js.
SUFFIXES = {"float32": "", "float16": "_fp16", "int8": "_quantized"}
GRAPHS_FOLDER, LANGUAGE_FILE = "onnx", "expert.json"


@dataclass(frozen=True)
class ExportedExpert:
    """
    The folder of an exported expert.

    Args:
        folder (`Path`): Has the graphs in `onnx/`, and beside it the files of the processor and [`LANGUAGE_FILE`].
        language (`str`): The tag of the expert's language.
        prompt_language (`str`): Whisper's code of the language in the prompt.
    """

    folder: Path
    language: str
    prompt_language: str

    @classmethod
    def open(cls, folder: Path) -> ExportedExpert:
        """Read a folder. Raises a `ValueError` if it is not that of an exported expert."""
        path = folder / LANGUAGE_FILE
        content = read_json(path) if path.is_file() else None
        if not isinstance(content, dict) or not {"language", "prompt_language"} <= content.keys():
            raise ValueError(
                f"{folder} is not the folder of an exported expert: make one with peft-clsr export --format onnx"
            )
        return cls(folder, content["language"], content["prompt_language"])

    def graph(self, name: str, precision: str) -> Path:
        """The file of a graph. Raises a `ValueError` if it was not exported in that precision."""
        path = self.folder / GRAPHS_FOLDER / graph_file(name, precision)
        if not path.is_file():
            found = [known for known in SUFFIXES if (path.parent / graph_file(name, known)).is_file()]
            raise ValueError(
                f"{self.folder} has no graphs in {precision}, it has {', '.join(found) or 'none'}: export it again "
                f"with --precision {precision}"
            )
        return path


def graph_file(name: str, precision: str) -> str:
    """The name of the file of a graph."""
    return f"{name}{SUFFIXES[precision]}.onnx"
