"""`peft-clsr pseudo-label`: transcripts by a teacher, filtered, as a folder to train on."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DESCRIPTION = "transcribe recordings with a teacher, to train on its transcripts"

_ABOUT = """\
Transcribe recordings of any length with a teacher, filter the transcripts, and
write a folder that 'peft-clsr train --dataset' reads. A second call with other
filters transcribes nothing again. With a second teacher's folder as --other,
only what both hear alike is kept. Several processes: accelerate launch -m
peft_clsr pseudo-label ...
"""


def make_parser(prog: str, everything: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog, description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--teacher", required=True, help="the Whisper that transcribes: Hub id or folder")
    add("--adapters", nargs="+", default=[], help="its experts: folders, or repositories on the Hub")
    add("--dataset", required=True, help="as for 'peft-clsr train', or a folder of recordings; transcripts may lack")
    add("--language", required=True, help="tag or English name of the language")
    add("--output_dir", type=Path, required=True, help="folder of the labels and of the table to train on")
    add = parser.add_argument_group("data").add_argument
    add("--split", default="train", help="split of the dataset")
    add("--dataset_config", help="configuration on the Hub, or subfolder")
    add("--audio_column", default="audio", help="column of the audio (Hub datasets)")
    add("--text_column", default="transcription", help="column of transcripts, if there are some, to compare with")
    add("--file_column", help="column of file names in a table; by default file_name, or path")
    add = parser.add_argument_group("filters ('off' turns one off)").add_argument
    add("--min_log_probability", type=_limit, default=-1.0, help="least mean log-probability of a token, in nats")
    add("--max_compression_ratio", type=_limit, default=2.4, help="above it, a text repeats itself")
    add("--max_no_speech_probability", type=_limit, default=0.6, help="above it, nobody may be speaking")
    add("--max_wer", type=_limit, default=None, help="highest error rate against a given transcript, such as 0.3")
    add("--other", type=Path, help="output_dir of a second teacher, for the same recordings")
    add("--max_disagreement", type=float, default=0.2, help="highest share of words that the second hears differently")
    add = parser.add_argument_group("speed").add_argument
    add("--batch_size", type=int, default=8, help="recordings at a time")
    add("--num_beams", type=int, default=1, help="beams of the search; 1 is greedy")
    add("--vad", action="store_true", help="hear only speech, cut at pauses (silero-vad, extra vad)")
    add("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="precision of the teacher")
    return parser


def _limit(text: str) -> float | None:
    try:
        limit = None if text == "off" else float(text)
    except ValueError:
        limit = math.nan
    if limit is not None and not math.isfinite(limit):
        raise argparse.ArgumentTypeError(f"{text!r} is no limit: expected a number, or 'off'")
    return limit


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    arguments = parser.parse_args(argv)

    import logging

    from accelerate import PartialState
    from transformers.utils import logging as transformers_logging

    from ..extras import require

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    transformers_logging.set_verbosity_error()
    try:
        for name in ("av", "datasets", "jiwer", "soundfile", "soxr"):
            require(name)
        _check(arguments, parser.get_default)
        labels = _label(arguments)
        if PartialState().is_main_process:
            _write_table(labels, arguments)
        PartialState().wait_for_everyone()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")
    return 0


def _check(arguments: argparse.Namespace, default: Callable[[str], Any]) -> None:
    """Raise a `ValueError` for what cannot be used, before a model is loaded."""
    from ..distillation.pseudo_labels.folder import check_folder
    from ..languages.tags import language_tag
    from ..sources import check_source

    arguments.language = language_tag(arguments.language)
    for name in ("batch_size", "num_beams"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}, expected at least 1")
    if not 0 <= arguments.max_disagreement <= 1:
        raise ValueError(f"--max_disagreement is {arguments.max_disagreement}, expected a share of words, 0 to 1")
    if arguments.other is None:
        if arguments.max_disagreement != default("max_disagreement"):
            raise ValueError("--max_disagreement changes nothing without --other: leave it out, or give --other")
    else:
        if not (arguments.other / _ALL).is_dir():
            raise ValueError(f"--other {arguments.other} has no finished labels: run this command for it first")
        if arguments.other.resolve() == arguments.output_dir.resolve():
            raise ValueError(
                f"--other is --output_dir, {arguments.other}: give the folder of another teacher's labels"
            )
    check_folder(arguments.output_dir)
    check_source(
        arguments.dataset.replace("{language}", arguments.language), "--dataset", "a dataset", is_dataset=True
    )
    names = ("split", "dataset_config", "text_column", "file_column")
    unused = [f"--{name}" for name in names if getattr(arguments, name) != default(name)]
    if unused and _has_recordings_alone(arguments):
        raise ValueError(
            f"--dataset {arguments.dataset} has neither tables nor texts, so {', '.join(unused)} would do nothing: "
            "leave it out"
        )


# All labels, unfiltered, beside the table. Without audio, which would be copied for each segment of a recording.
_ALL = "all"
_COLUMNS = ("transcription", "start", "end", "log_probability", "compression_ratio", "no_speech_probability", "wer")


def _label(arguments: argparse.Namespace) -> Any:
    import torch
    from accelerate import PartialState
    from peft.utils import infer_device

    from ..distillation.pseudo_labels.label import pseudo_label
    from ..inference.experts import load_with_experts

    process = PartialState(cpu=infer_device() == "cpu")
    with process.main_process_first():  # the other processes read what is cached
        recordings = _recordings(arguments)
    if arguments.other is not None:
        _check_other(arguments, recordings)
    teacher, processor = load_with_experts(
        arguments.teacher, arguments.adapters, {arguments.language}, getattr(torch, arguments.dtype), "--teacher"
    )
    return pseudo_label(
        recordings,
        teacher.to(process.device),
        processor,
        arguments.language,
        output_dir=arguments.output_dir,
        audio_column=arguments.audio_column,
        text_column=arguments.text_column,
        batch_size=arguments.batch_size,
        num_beams=arguments.num_beams,
        vad=arguments.vad,
    )


def _check_other(arguments: argparse.Namespace, recordings: Any) -> None:
    """Raise a `ValueError` if the second teacher's labels are of other recordings."""
    from ..data.rows import without_decoding
    from ..distillation.pseudo_labels.folder import audio_digest, read_settings

    digest = audio_digest(without_decoding(recordings, arguments.audio_column), arguments.audio_column)
    if read_settings(arguments.other).get("audio") != digest:
        raise ValueError(
            f"--other {arguments.other} has labels of other recordings, or these files have changed since: run this "
            "command for both teachers with the same --dataset and --split"
        )


def _recordings(arguments: argparse.Namespace) -> Any:
    """The recordings of a dataset, or of a folder of audio files without transcripts."""
    import datasets

    from ..data.tables import load_recordings
    from ..inference.recordings import audio_files

    if _has_recordings_alone(arguments):
        folder, output_dir = Path(arguments.dataset).resolve(), arguments.output_dir.resolve()
        paths = [str(path) for path in audio_files(folder) if not path.is_relative_to(output_dir)]
        if not paths:
            raise ValueError(f"--dataset {folder} has no recordings")
        return datasets.Dataset.from_dict({arguments.audio_column: paths})
    return load_recordings(
        arguments.dataset,
        arguments.language,
        arguments.split,
        config=arguments.dataset_config,
        audio_column=arguments.audio_column,
        text_column=arguments.text_column,
        file_column=arguments.file_column,
        transcribed=False,
    )


def _has_recordings_alone(arguments: argparse.Namespace) -> bool:
    """True if the dataset is a folder without tables, and without texts beside recordings, but those written here."""
    folder, output_dir = Path(arguments.dataset).resolve(), arguments.output_dir.resolve()
    return folder.is_dir() and not _has_tables_or_texts(folder, output_dir)


def _has_tables_or_texts(folder: Path, output_dir: Path) -> bool:
    """True if a folder has tables, or texts of the name of a recording beside it, that this command did not write."""
    from ..data.subtitle_files import TIMED_ENDINGS
    from ..data.table_files import name_key
    from ..data.table_reader import TABLE_SUFFIXES
    from ..inference.recordings import audio_files

    recordings = {(path.parent, name_key(path.stem)) for path in audio_files(folder)}
    for path in folder.rglob("*"):
        if path.is_relative_to(output_dir):
            continue
        if path.suffix.lower() in {*TABLE_SUFFIXES, ".parquet"}:
            return True
        is_text = path.suffix.lower() in {".txt", *TIMED_ENDINGS}
        # Also "talk.ca.srt" is of "talk.wav".
        stems = {name_key(path.stem), name_key(Path(path.stem).stem)}
        if is_text and any((path.parent, stem) in recordings for stem in stems):
            return True
    return False


def _write_table(labels: Any, arguments: argparse.Namespace) -> None:
    """Filter the labels, and write the table to train on."""
    import shutil

    import datasets

    from ..data.audio_files import audio_paths
    from ..data.rows import without_decoding
    from ..distillation.pseudo_labels.filters import describe_hours, filter_pseudo_labels
    from ..files import to_json, write_text

    folder = arguments.output_dir
    # Complete or not at all, also after a kill.
    unfinished = folder / f"{_ALL}.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    labels.remove_columns(arguments.audio_column).save_to_disk(unfinished)
    shutil.rmtree(folder / _ALL, ignore_errors=True)
    unfinished.rename(folder / _ALL)
    kept, hours = filter_pseudo_labels(
        labels,
        min_log_probability=arguments.min_log_probability,
        max_compression_ratio=arguments.max_compression_ratio,
        max_no_speech_probability=arguments.max_no_speech_probability,
        max_wer=arguments.max_wer,
        other_labels=None if arguments.other is None else datasets.load_from_disk(str(arguments.other / _ALL)),
        max_disagreement=arguments.max_disagreement,
        language=arguments.language,
    )
    table = folder / "train" / "metadata.jsonl"
    lines = []
    table.parent.mkdir(exist_ok=True)
    parent = table.parent.resolve()  # ".." leads elsewhere from a symbolic link
    audio_column = arguments.audio_column
    paths = audio_paths(without_decoding(kept, audio_column), audio_column, folder / "audio")
    for path, row in zip(paths, kept.remove_columns(audio_column), strict=True):
        cells = {"file_name": os.path.relpath(path, parent), "language": arguments.language}
        cells |= {name: "" if row[name] is None else row[name] for name in _COLUMNS}
        lines.append(to_json(cells, indent=None))
    write_text(table, "".join(lines))
    print(describe_hours(hours), file=sys.stderr)
    print(f"{len(kept)} of {len(labels)} rows are in {table}: train on them with --dataset {folder}")
