"""`peft-clsr transcribe` with ONNX Runtime: an exported expert, without PyTorch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..inference.recordings import Recording
    from ..inference.subtitles import Transcript
    from .transcribe import Share, TranscribeRecordings

_RATE = 16_000  # Hz, of all Whispers
# Options of the other runtime, and what stands for them here.
_OTHERS = {
    "adapters": "the expert is in the graphs of --model",
    "route_by_prompt_language": "the graphs are for one language",
    "num_beams": "decoding is greedy",
    "batch_size": "recordings are taken one at a time",
    "device": "the graphs run on the CPU",
    "dtype": "--precision chooses the graphs",
}


def check(arguments: argparse.Namespace, default: Callable[[str], Any]) -> None:
    """
    Check options and the folder of the export. The batch size becomes one.

    Raises:
        ValueError: an option is for another runtime, or the folder has no such graphs.
        ModuleNotFoundError: the extra `onnx` is not installed.
    """
    from ..extras import require
    from ..inference.exported import DECODER, ENCODER, ExportedExpert

    for name, reason in _OTHERS.items():
        if getattr(arguments, name) != default(name):
            raise ValueError(f"--{name} is for --runtime pytorch; with --runtime onnx, {reason}: leave it out")
    arguments.batch_size = 1
    expert = ExportedExpert.open(Path(arguments.model))
    for graph in (ENCODER, DECODER):
        expert.graph(graph, arguments.precision)
    for name in ("onnxruntime", "faster_whisper"):
        require(name)


def load(
    arguments: argparse.Namespace, languages: set[str | None], candidates: list[str], share: Share | None = None
) -> TranscribeRecordings:
    """
    Load the graphs. `languages` are those of the recordings; `None` is the expert's.

    `share` is that of this process, if there are several.

    Raises:
        ValueError: a recording has another language than the expert.
    """
    from tqdm import tqdm

    from ..inference.exported import ExportedExpert
    from ..inference.gaps import warn_of_gaps
    from ..inference.onnx_whisper import OnnxWhisper
    from ..inference.recordings import read_recordings
    from ..languages.tags import closest_tags

    expert = ExportedExpert.open(Path(arguments.model))
    others = sorted(tag for tag in languages if tag is not None and not closest_tags(tag, [expert.language]))
    if others:
        raise ValueError(
            f"the graphs in {arguments.model} are for {expert.language!r} alone, and recordings are in "
            f"{', '.join(others)}: export an expert of that language, or take --runtime pytorch"
        )
    whisper = OnnxWhisper(expert, arguments.precision, threads=None if share is None else share.threads)

    def transcribe(
        recordings: list[Recording], on_window: Callable[[Path, Transcript], None], warn: Callable[[str], None]
    ) -> Generator[tuple[Path, Transcript], None, None]:
        paths = [(recording.path, None) for recording in recordings]
        total = round(sum(recording.seconds for recording in recordings))
        with tqdm(total=total, desc="audio", unit="s", disable=share is not None) as progress:
            finished = 0.0  # seconds
            for path, _, waveform in read_recordings(paths, _RATE, warn):

                def on_segment(transcript: Transcript, path: Path = path, before: float = finished) -> None:
                    on_window(path, transcript)
                    progress.update(round(before + transcript.segments[-1]["end"]) - progress.n)

                settings = {"task": arguments.task, "vad": arguments.vad, "on_segment": on_segment}
                transcript = whisper.transcribe(waveform, **settings)
                finished += transcript.seconds
                progress.update(round(finished) - progress.n)
                if not arguments.vad:
                    warn_of_gaps(path, transcript, waveform, _RATE, warn)
                yield path, transcript

    return transcribe
