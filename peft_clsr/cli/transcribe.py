"""`peft-clsr transcribe`: files and folders in, text, SRT, VTT or JSON out."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..files import unfinished_path
from .help import hide

if TYPE_CHECKING:
    from ..inference.recordings import Recording
    from ..inference.subtitles import Transcript

    # Takes recordings, the longest first, a function that keeps the transcript so far of each, and one that shows a
    # warning. Yields each with its whole transcript.
    TranscribeRecordings: TypeAlias = Callable[
        [list[Recording], Callable[[Path, Transcript], None], Callable[[str], None]],
        Generator[tuple[Path, Transcript], None, None],
    ]

REGISTERS_ITSELF = True  # --runtime onnx needs no torch
DESCRIPTION = "transcribe recordings with a Whisper and its language experts"

_EPILOG = """\
Each recording takes the expert of its language, or the base model if there is none. With several languages in
--language, or none, the base model detects the language at the start of each recording, which is often wrong for short
ones. A table gives the languages: recordings/metadata.csv with the columns file_name (relative to it) and language,
instead of the folder.

A transcript grows in a file with the ending .part, which is renamed when it is finished. Existing transcripts are
kept, so an interrupted run continues with the other recordings when it is started again. Files that cannot be read, or
whose transcript would have too long a name, are named first, and skipped; the exit status is then 1.

examples:
  peft-clsr transcribe recordings/ --model openai/whisper-base --adapters experts/ --language ca \\
      --output_format srt --output_dir out/
"""


@dataclass(frozen=True)
class Share:
    """One process among several: its number, from 0, and its CPU threads."""

    number: int
    threads: int


def make_parser(prog: str, everything: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("inputs", nargs="+", type=Path, help="recordings, folders of them, and tables metadata.csv")
    add = parser.add_argument_group("model and languages").add_argument
    add("--model", required=True, help="base Whisper: Hub id or folder; with --runtime onnx, the folder of an export")
    add(
        "--adapters",
        nargs="+",
        default=[],
        help="experts: an adapter folder, a folder with one folder a language, or a Hub repository",
    )
    add("--language", nargs="+", default=[], help="tags or English names; detected if there is not exactly one")
    add(
        "--route_by_prompt_language",
        action="store_true",
        help="detected without an expert: take the only expert whose prompt has that language",
    )
    add("--task", choices=["transcribe", "translate"], default="transcribe", help="translate: into English")
    add(
        "--vad",
        action="store_true",
        help="hear only speech, cut at pauses (silero-vad, extra vad): no text is invented in silence",
    )
    add = parser.add_argument_group("output").add_argument
    add("--output_format", choices=["text", "srt", "vtt", "json"], default="text", help="format of the transcripts")
    add("--output_dir", type=Path, help="folder for transcripts, with the folders of the inputs; printed without it")
    add("--overwrite", action="store_true", help="replace existing transcripts")
    add = parser.add_argument_group("speed").add_argument
    add("--batch_size", type=int, default=8, help="recordings at a time")
    add("--num_processes", type=int, default=1, help="processes on this machine; each loads the model")
    add("--num_beams", type=int, default=1, help="beams of the search; 1 is greedy")
    add("--device", help="cpu, cuda, cuda:1, ...; a GPU if there is one")
    add("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="precision of base and experts")
    add("--runtime", choices=["pytorch", "onnx"], default="pytorch", help="onnx: an exported expert, without PyTorch")
    add(
        "--precision",
        choices=["float32", "float16", "int8"],
        default="float32",
        help="with --runtime onnx: its graphs",
    )
    if not everything:
        hide(parser, ("route_by_prompt_language", "num_beams"))
    return parser


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    arguments = parser.parse_args(argv)
    from ..extras import require
    from ..inference.recordings import find_recordings, split_readable
    from ..languages.tags import language_tag
    from .transcribe_processes import load_in_processes

    runtime = importlib.import_module(f".transcribe_{arguments.runtime}", __package__)
    try:
        # Check everything about the run as a whole before the first recording.
        for name in ("av", "soundfile", "soxr"):
            require(name)
        candidates = list(dict.fromkeys(language_tag(language) for language in arguments.language))
        _check(arguments)
        runtime.check(arguments, parser.get_default)
        language = candidates[0] if len(candidates) == 1 else None
        recordings = find_recordings(arguments.inputs, arguments.output_dir, arguments.output_format, language)
        pending = [
            recording for recording in recordings if not (recording.output and os.path.exists(recording.output))
        ]
        if len(pending) < len(recordings) and not arguments.overwrite:
            existing = len(recordings) - len(pending)
            print(f"{existing} of {len(recordings)} have a transcript, which is kept (--overwrite replaces it)")
            recordings = pending
            if not recordings:
                return 0
        recordings, unreadable = split_readable(recordings)
        for problem in unreadable:
            print(f"skipped: {problem}", file=sys.stderr)
        total = len(recordings) + len(unreadable)
        print(f"{len(recordings)} of {total} recordings can be read", file=sys.stderr)
        if not recordings:
            return 1
        recordings.sort(key=lambda recording: recording.seconds, reverse=True)
        languages: set[str | None] = {recording.language for recording in recordings}
        if None not in languages:
            candidates = []  # nothing is detected
        elif candidates:
            languages = languages - {None} | set(candidates)
        processes = min(arguments.num_processes, len(recordings))
        if processes < arguments.num_processes:
            print(
                f"{processes} of the {arguments.num_processes} processes are started: one a recording", file=sys.stderr
            )
        if processes == 1:
            transcribe = runtime.load(arguments, languages, candidates)
        else:
            transcribe = load_in_processes(processes, arguments, languages, candidates)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")
    try:
        transcribed = _transcribe_all(transcribe, recordings, arguments)
    except MemoryError as error:
        parser.exit(2, f"error: {error}\nTake a smaller --batch_size; finished transcripts are kept\n")
    except OSError as error:
        parser.exit(2, f"error: a transcript cannot be written: {error}\n")
    skipped = total - transcribed
    print(f"{transcribed} transcribed, {skipped} skipped", file=sys.stderr)
    return 1 if skipped else 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise a `ValueError` for a number, a folder or a combination of arguments that cannot be used."""
    from ..files import check_output_folder

    for name in ("batch_size", "num_beams", "num_processes"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}, expected at least 1")
    if arguments.output_dir is None:
        if arguments.output_format != "text":
            raise ValueError(f"--output_format {arguments.output_format} is written to files: give an --output_dir")
    else:
        check_output_folder(arguments.output_dir, "--output_dir")
        arguments.output_dir.mkdir(parents=True, exist_ok=True)


def _transcribe_all(
    transcribe: TranscribeRecordings, recordings: list[Recording], arguments: argparse.Namespace
) -> int:
    """
    Transcribe and write all recordings. Returns the number of transcripts.

    A transcript grows at the [`unfinished_path`] of its output, and becomes the output at its end. If the work is
    interrupted, the file stays with what was heard. Without outputs, what was heard is printed.
    """
    from tqdm import tqdm

    from ..files import write_text
    from ..inference.subtitles import format_transcript

    outputs = {recording.path: recording.output for recording in recordings}
    unfinished: dict[Path, Transcript] = {}

    def keep(path: Path, transcript: Transcript) -> None:
        output = outputs[path]
        if output is not None:
            text = format_transcript(transcript, arguments.output_format, path, arguments.task)
            write_text(unfinished_path(output), text)
        unfinished[path] = transcript

    def warn(message: str) -> None:
        tqdm.write(message, file=sys.stderr)

    count = 0
    try:
        with closing(transcribe(recordings, keep, warn)) as transcripts:
            for path, transcript in transcripts:
                keep(path, transcript)
                output = outputs[path]
                if output is None:
                    tqdm.write(f"{path}: {_one_line(transcript)}")
                else:
                    unfinished_path(output).replace(output)
                del unfinished[path]
                count += 1
    finally:  # interrupted, or a process died
        for path, transcript in unfinished.items():
            _tell_unfinished(path, transcript, outputs[path])
    return count


def _one_line(transcript: Transcript) -> str:
    return " ".join(word for segment in transcript.segments for word in segment["text"].split())


def _tell_unfinished(path: Path, transcript: Transcript, output: Path | None) -> None:
    """Say where the transcript of an interrupted recording is, or print it."""
    end = transcript.segments[-1]["end"] if transcript.segments else 0.0
    place = f" is in {unfinished_path(output)}" if output else f": {_one_line(transcript)}"
    print(f"{path}: interrupted; what was heard up to {end:.0f} s{place}", file=sys.stderr if output else sys.stdout)
