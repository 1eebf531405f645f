"""`peft-clsr app`: a page that shows what an expert changes."""

from __future__ import annotations

import argparse
import signal

DESCRIPTION = "open a page to try a Whisper and its language experts"

_EPILOG = """\
Record or drop a file: the page shows the text by the base model and by the expert, where they differ, and where the
expert's gates are open. Uploads are deleted as soon as they are read.

examples:
  peft-clsr app --model openai/whisper-small --adapters me/experts
  peft-clsr app --model openai/whisper-base --adapters runs/ca --examples my_recordings/metadata.csv
"""


def make_parser(prog: str, everything: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION, epilog=_EPILOG)
    add = parser.add_argument_group("model and languages").add_argument
    add("--model", required=True, help="base Whisper: Hub id or folder")
    add(
        "--adapters",
        nargs="+",
        required=True,
        help="experts: an adapter folder, a folder with one folder a language, or a Hub repository",
    )
    add("--language", nargs="+", default=[], help="offer only these, tags or English names; all by default")
    add = parser.add_argument_group("page").add_argument
    add("--examples", nargs="+", default=[], help="recordings to offer: files, folders, or tables with their text")
    add("--max_seconds", type=float, default=1800, help="length of a recording")
    add("--host", default="127.0.0.1", help="where to listen; 0.0.0.0 for all networks")
    add("--port", type=int, help="the port; by default a free one from 7860 on")
    return parser


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    arguments = parser.parse_args(argv)
    from ..extras import require

    try:
        for name in ("av", "soundfile", "soxr", "jiwer", "gradio"):
            require(name)
        from ..app.page import find_examples, launch_page
        from ..app.recognizer import Recognizer

        if not arguments.max_seconds > 0:
            raise ValueError(f"--max_seconds is {arguments.max_seconds:g}, expected more than 0")
        examples = find_examples(arguments.examples)
        recognizer = Recognizer(arguments.model, arguments.adapters, arguments.language, arguments.max_seconds)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder of uploads is deleted
        launch_page(recognizer, examples, arguments.host, arguments.port)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")
    return 0
