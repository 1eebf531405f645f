"""`peft-clsr export`: an expert for other software, in one of several formats."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass
from pathlib import Path

from .help import hide

DESCRIPTION = "export an expert for other software: ONNX, OpenVINO, CTranslate2, or a LoRA of PEFT"

_EPILOG = """\
--format onnx and openvino keep the gates, and write graphs: for ONNX Runtime, transformers.js and others, or for
OpenVINO GenAI, with a folder for each precision in output_dir. The other formats have no gates: the recordings decide
what each module becomes. output_dir gets two folders: whisper, for transformers, and ctranslate2, for faster-whisper,
or lora, for PEFT on the original base. If a module stays routed, nothing is written, and the exit status is 1. All
error rates are measured on the recordings.

examples:
  peft-clsr export --format onnx --base openai/whisper-base --adapter runs/ca/ca --language ca \\
      --dataset my_recordings --output_dir exports/ca
  peft-clsr export --base openai/whisper-base --adapter runs/ca/ca --language ca --dataset my_recordings \\
      --output_dir exports/ca
  peft-clsr export --format lora --base openai/whisper-base --adapter runs/ca/ca --language ca \\
      --dataset my_recordings --output_dir exports/ca
"""


@dataclass(frozen=True)
class Format:
    """
    A value of `--format`.

    Args:
        module (`str`): The module of this folder with `export(arguments)`, which returns the exit status.
        requires (`tuple[str, ...]`): Optional dependencies, besides those of all formats.
        options (`tuple[str, ...]`): Options that formats without them refuse.
    """

    module: str
    requires: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


_FREEZING = ("threshold", "undecided", "recover_steps", "recover_split", "recover_learning_rate")
_ONNX = ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "faster_whisper")
FORMATS = {
    "ctranslate2": Format("export_frozen", ("ctranslate2", "faster_whisper"), (*_FREEZING, "quantization")),
    "onnx": Format("export_graphs", _ONNX, ("precision",)),
    "openvino": Format("export_graphs", ("openvino_genai", "nncf"), ("precision",)),
    "lora": Format("export_frozen", options=(*_FREEZING, "lora_rank")),
}


_RARE = ("audio_column", "file_column", "text_column", "dataset_config", "threshold", "full_context", "batch_size")
_RARE += ("max_new_tokens", "recover_split", "recover_learning_rate")


def make_parser(prog: str, everything: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION, epilog=_EPILOG)
    add = parser.add_argument_group("model and recordings").add_argument
    add("--base", required=True, help="the Whisper that the adapter was trained on: Hub id or folder")
    add("--adapter", required=True, help="an adapter folder, or a repository of languages on the Hub")
    add("--language", required=True, help="tag or English name of the language")
    add("--dataset", required=True, help="Hub id, or a folder, as for train")
    add("--dataset_config", help="configuration on the Hub (ca_es), or subfolder")
    add("--split", default="test", help="split to use")
    add("--audio_column", default="audio", help="column of the audio (Hub datasets)")
    add("--file_column", help="column of file names in a table; by default file_name, or path")
    add("--text_column", default="transcription", help="column of the transcripts")
    add("--max_samples", type=int, help="use only the first so many")
    add("--full_context", action="store_true", help="restore the 30 s of an adapter trained at a shorter context")
    add("--max_new_tokens", type=int, default=200, help="longest transcript in tokens, at most 224")
    add("--batch_size", type=int, default=8, help="utterances at a time")
    add = parser.add_argument_group("freezing").add_argument
    add("--threshold", type=float, default=0.95, help="share of tokens that decides a module")
    add(
        "--undecided",
        choices=["loss", "majority", "routed"],
        default="loss",
        help="what other modules become: by their 'loss', by the 'majority' of their tokens, or 'routed' as before",
    )
    add(
        "--recover_steps",
        type=int,
        default=0,
        help="then train the frozen model for so many steps, with the routed one as its teacher",
    )
    add("--recover_split", default="train", help="split of the dataset to train on")
    add("--recover_learning_rate", type=float, default=5e-4, help="learning rate of that training")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True, type=Path, help="folder to create")
    add("--format", choices=list(FORMATS), default="ctranslate2", help="what to write")
    add(
        "--precision",
        nargs="+",
        choices=["float32", "float16", "int8"],
        default=["float32"],
        help="of the graphs; several in one run",
    )
    add("--quantization", default="float32", help="CTranslate2's: float32, float16, int8, ...")
    add("--lora_rank", type=int, help="rank of the LoRA of a full expert; a low-rank expert keeps its own")
    if not everything:
        hide(parser, _RARE)
    return parser


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    arguments = parser.parse_args(argv)
    import logging

    from ..extras import require

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("peft_clsr.data").setLevel(logging.INFO)  # says which rows are used
    chosen = FORMATS[arguments.format]
    try:
        _check_options(parser, arguments)
        for name in ("av", "datasets", "jiwer", "soundfile", *chosen.requires):
            require(name)
        return importlib.import_module(f".{chosen.module}", __package__).export(arguments)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")


def _check_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Raise a `ValueError` for an option that changes nothing."""
    for option in dict.fromkeys(option for other in FORMATS.values() for option in other.options):
        is_given = getattr(arguments, option) != parser.get_default(option)
        if is_given and option not in FORMATS[arguments.format].options:
            names = " or ".join(name for name, other in FORMATS.items() if option in other.options)
            raise ValueError(
                f"--{option} changes nothing in --format {arguments.format}: leave it out, or take --format {names}"
            )
        if is_given and option.startswith("recover_") and not arguments.recover_steps:
            raise ValueError(
                f"--{option} changes nothing without --recover_steps: leave it out, or give --recover_steps"
            )
