"""
Transcribe recordings with a Whisper and its language experts: files and folders in, text, SRT, VTT or JSON out.

    python examples/transcribe.py recordings/ --model openai/whisper-base --adapters experts/ --language ca \
        --output_format srt --output_dir out/

    python examples/transcribe.py recordings/ --model openai/whisper-base --adapters experts/ --language ca ro uk \
        --output_format json --output_dir out/

Each recording takes the expert of its language, or the base model where there is none. The language is that of
`--language`; of several, or of all of Whisper's where none is given, the base model detects it in the start of each
recording, which is often wrong for short ones. A table says it for each: `recordings/metadata.csv` with the columns
`file_name` (relative to it) and `language`, given in place of the folder.

Transcripts are written as they are made, and those that are there already are kept: an interrupted run goes on when
it is started again. A file that cannot be read is named and skipped, and the exit status is 1. All options: `--help`.
"""

from __future__ import annotations

import argparse
import copy
import csv
import html
import json
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pysubs2
import soundfile
import torch
import torch.nn.functional as F
from peft import PeftModel
from tqdm import tqdm
from transformers import (
    AutoConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.utils import logging

from peft_clsr import (
    HubLanguage,
    inference_adapter,
    language_code,
    list_languages,
    load_language,
    read_audio,
    read_languages,
)
from peft_clsr.whisper import POSITIONS_PER_SECOND

SUFFIXES = {"text": ".txt", "srt": ".srt", "vtt": ".vtt", "json": ".json"}
# What is taken for a recording in a folder. libsndfile does not read those of the second line: they are named, too.
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64", ".rf64"}
AUDIO_SUFFIXES |= {".m4a", ".mp4", ".aac", ".wma", ".webm", ".amr", ".3gp", ".mka", ".mkv", ".mov"}


@dataclass
class Recording:
    """
    A file to transcribe.

    Args:
        path (`Path`): The file.
        output (`Path`, *optional*): Where its transcript goes; it is printed by default.
        language (`str`, *optional*): Its code, where it is known.
        seconds (`float`): Its length, as its header says.
    """

    path: Path
    output: Path | None
    language: str | None
    seconds: float


@dataclass
class Transcript:
    """
    What was heard.

    Args:
        language (`str`): The code that was given or detected.
        adapter (`str`, *optional*): The adapter that heard it; `None` for the base model.
        seconds (`float`): Length of the recording.
        segments (`list[dict]`): "start" and "end" in seconds, and "text" with the spaces around it.
    """

    language: str
    adapter: str | None
    seconds: float
    segments: list[dict[str, Any]]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, help="recordings, folders of them, and tables metadata.csv of them")
    add("--model", required=True, help="base Whisper: Hub id or folder")
    add(
        "--adapters",
        nargs="+",
        default=[],
        help="experts: the folder of one, a folder with one folder a language, or a Hub repository",
    )
    add(
        "--language",
        nargs="+",
        default=[],
        help="code or English name; of several, or of all of Whisper's, each recording's is detected",
    )
    add("--task", choices=["transcribe", "translate"], default="transcribe", help="translate: into English")
    add("--output_format", choices=list(SUFFIXES), default="text", help="format of the transcripts")
    add("--output_dir", type=Path, help="folder to write to, with the folders of the inputs; printed without it")
    add("--overwrite", action="store_true", help="replace transcripts that are there already; they are kept without")
    add("--batch_size", type=int, default=8, help="recordings at a time")
    add("--num_beams", type=int, default=1, help="beams of the search; 1 is greedy")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute: cpu, cuda, cuda:1")
    add("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="precision of the base model")
    return parser


def main() -> int:
    parser = make_parser()
    arguments = parser.parse_args()
    logging.set_verbosity_error()  # Whisper's generate passes itself arguments that transformers then warns of
    try:
        # Everything that can be wrong with the run as a whole, before the first recording.
        arguments.language = list(dict.fromkeys(language_code(language) for language in arguments.language))
        check(arguments)
        recordings = find_recordings(arguments)
        kept = [recording for recording in recordings if recording.output is not None and recording.output.exists()]
        if kept and not arguments.overwrite:
            print(f"{len(kept)} of {len(recordings)} have a transcript, which is kept (--overwrite makes them anew)")
            recordings = [recording for recording in recordings if not recording.output.exists()]
            if not recordings:
                return 0
        model, processor = load_model(arguments, recordings)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    try:
        skipped = transcribe_all(model, processor, recordings, arguments)
    except torch.cuda.OutOfMemoryError as error:
        parser.exit(2, f"error: {error}\nTake a smaller --batch_size; what is written stays, and is not made again\n")
    except OSError as error:
        parser.exit(2, f"error: a transcript cannot be written: {error}\n")
    print(f"{len(recordings) - skipped} transcribed, {skipped} skipped", file=sys.stderr)
    return 1 if skipped else 0


def check(arguments: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: a number, a place or a combination of arguments that cannot be.
    """
    for name in ("batch_size", "num_beams"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}, expected at least 1")
    if arguments.output_dir is None:
        if arguments.output_format != "text":
            raise ValueError(f"--output_format {arguments.output_format} is written to files: give an --output_dir")
    else:
        try:
            arguments.output_dir.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"--output_dir {arguments.output_dir} is a file, expected a folder") from error
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {arguments.device} cannot be used: {error}") from error


def find_recordings(arguments: argparse.Namespace) -> list[Recording]:
    """
    The recordings of files, folders and tables, each with the file that its transcript goes to.

    Args:
        arguments (`argparse.Namespace`):
            `inputs`, files of any name, folders, in which audio files are taken, and tables; `output_dir`, in which
            a recording keeps its place in its folder; `output_format`; `language`, of recordings without their own.

    Raises:
        ValueError: nothing of that name, no recording, or two whose transcripts would be one file.
        OSError: a folder or table that may not be read.
    """
    found: dict[Path, tuple[Path, str | None]] = {}  # its path in the output, and its language
    language = arguments.language[0] if len(arguments.language) == 1 else None
    for given in arguments.inputs:
        if not given.exists():
            raise ValueError(f"{given} does not exist: give audio files, folders of them, or tables of them")
        if given.is_dir():
            for path in _audio_files(given):
                found.setdefault(path, (path.relative_to(given), language))
        elif given.suffix.lower() == ".csv":
            for name, own in _read_table(given):
                inside = not Path(name).is_absolute() and ".." not in Path(name).parts
                found.setdefault(given.parent / name, (Path(name if inside else Path(name).name), own or language))
        else:
            found.setdefault(given, (Path(given.name), language))
    if not found:
        raise ValueError(
            f"no recording in {', '.join(map(str, arguments.inputs))}: of a folder, files that end in "
            f"{', '.join(sorted(AUDIO_SUFFIXES))} are taken; name others one by one"
        )
    sources: dict[Path, Path] = {}
    recordings = []
    for path, (relative, language) in found.items():
        output = None
        if arguments.output_dir is not None:
            # The end of an unknown name, such as "talk.2", may be a part of it.
            name = relative.stem if relative.suffix.lower() in AUDIO_SUFFIXES else relative.name
            output = arguments.output_dir / relative.with_name(name + SUFFIXES[arguments.output_format])
            other = sources.setdefault(output, path)
            if other.resolve() != path.resolve():
                raise ValueError(
                    f"{other} and {path} would both be written to {output}: rename one, or transcribe them into "
                    "folders of their own"
                )
            if other != path:
                continue  # the same file, given twice
        recordings.append(Recording(path, output, language, _header_seconds(path)))
    return recordings


def _read_table(path: Path) -> Iterator[tuple[str, str | None]]:
    """File names and language codes, where there are, of a table as `train_distilwhisper.py` takes it."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            if not row.get("file_name"):
                raise ValueError(f"{path} has a row without file_name: expected that column, and language if known")
            try:
                yield row["file_name"], language_code(row["language"]) if row.get("language") else None
            except ValueError as error:
                raise ValueError(f"{path}, column 'language': {error}") from error


def _audio_files(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders.sort()
        for name in sorted(names):
            # macOS leaves a "._x.wav", which is no audio, beside each x.wav on other file systems.
            if Path(name).suffix.lower() in AUDIO_SUFFIXES and not name.startswith("."):
                yield Path(parent, name)


def _header_seconds(path: Path) -> float:
    try:
        return soundfile.info(path).duration
    except (RuntimeError, OSError):
        return 0.0  # why it cannot be read will be said when it is


def load_model(
    arguments: argparse.Namespace, recordings: Sequence[Recording]
) -> tuple[WhisperForConditionalGeneration | PeftModel, WhisperProcessor]:
    """
    The base model with the adapters of all languages that the recordings may have, and its processor.

    Raises:
        ValueError: a model or adapters that are not reached or do not suit, or a language that the model lacks.
    """
    try:
        model_type = AutoConfig.from_pretrained(arguments.model).model_type
        if model_type != "whisper":
            raise ValueError(f"it is a {model_type}, expected a Whisper")
        model = WhisperForConditionalGeneration.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
        processor = WhisperProcessor.from_pretrained(arguments.model)
    except (ValueError, OSError) as error:
        raise ValueError(f"--model {arguments.model} cannot be used: {error}") from error
    known = getattr(model.generation_config, "lang_to_id", None)
    if not known:
        raise ValueError(f"--model {arguments.model} knows no languages, expected a multilingual Whisper")
    given = {recording.language for recording in recordings}
    languages = given - {None} | (set(arguments.language) if None in given else set())
    unknown = sorted(language for language in languages if f"<|{language}|>" not in known)
    if unknown:
        raise ValueError(f"the model {arguments.model} has no token for the language {', '.join(unknown)}")
    if None in given and not arguments.language:
        languages = set()  # any

    for source, language in choose_adapters(arguments.adapters, languages):
        name = language.subfolder or language.code
        if not Path(source).is_dir():
            model = load_language(model, source, name)
        elif isinstance(model, PeftModel):
            model.load_adapter(str(Path(source, language.subfolder)), name)
        else:
            model = PeftModel.from_pretrained(model, str(Path(source, language.subfolder)), adapter_name=name)
    return model.to(arguments.device).eval(), processor


def choose_adapters(sources: Sequence[str], languages: Collection[str]) -> list[tuple[str, HubLanguage]]:
    """
    The adapters of `languages` in folders and repositories, each with its source.

    Args:
        sources (`Sequence[str]`): Folders of an adapter, folders with one folder a language, and repositories.
        languages (`Collection[str]`): Codes; empty for all that there are.

    Raises:
        ValueError:
            A source without adapters, or none that is reached; none for the languages, or several for one of them;
            different contexts, or a cut one and a language without adapter.
    """
    there: dict[str, list[tuple[str, HubLanguage]]] = {}
    for source in sources:
        try:
            found = read_languages(Path(source)) if Path(source).is_dir() else list_languages(source)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"--adapters {source} is neither a folder here nor a repository that the Hub gives us: {error}"
            ) from error
        if not found:
            raise ValueError(
                f"--adapters {source} holds no adapter of a language: expected an adapter_config.json with a "
                "language, in it or in a folder a language"
            )
        for language in found:
            there.setdefault(language.code, []).append((source, language))
    chosen = {code: entries for code, entries in there.items() if not languages or code in languages}
    if sources and not chosen:
        raise ValueError(
            f"none of the adapters is for {', '.join(sorted(languages))}: they are for {', '.join(sorted(there))}. "
            "Leave --adapters out to transcribe with the base model"
        )
    for code, entries in chosen.items():
        if len(entries) > 1:
            places = ", ".join(str(Path(source, language.subfolder)) for source, language in entries)
            raise ValueError(f"several adapters are for {code}: {places}. Give one of them")
    adapters = [entries[0] for entries in chosen.values()]
    contexts = {language.code: language.max_audio_seconds for _, language in adapters}
    if len(set(contexts.values())) > 1:
        raise ValueError(
            "adapters on one model share its context, and these have different ones: "
            + ", ".join(f"{code} {f'{seconds:g} s' if seconds else 'all'}" for code, seconds in contexts.items())
            + ". Give those of one context, and only recordings of their languages: a folder or a table of their own"
        )
    seconds = next(iter(contexts.values()), None)
    missing = sorted(set(languages) - set(chosen))
    if seconds and (missing or not languages):
        raise ValueError(
            f"the adapters cut the model's context to {seconds:g} s, at which the base model is no use: "
            + (f"transcribe {', '.join(missing)} without them" if missing else "name the languages with --language")
            + f" (there are adapters for {', '.join(sorted(chosen))})"
        )
    return adapters


def transcribe_all(
    model: WhisperForConditionalGeneration | PeftModel,
    processor: WhisperProcessor,
    recordings: Sequence[Recording],
    arguments: argparse.Namespace,
) -> int:
    """Transcribe and write all recordings; returns how many could not be read."""
    # The longest first: batches are even, and memory that does not suffice shows at once.
    recordings = sorted(recordings, key=lambda recording: recording.seconds, reverse=True)
    rate, skipped = processor.feature_extractor.sampling_rate, 0
    with tqdm(total=round(sum(recording.seconds for recording in recordings)), desc="audio", unit="s") as progress:
        for start in range(0, len(recordings), arguments.batch_size):
            readable, waveforms = [], []
            for recording in recordings[start : start + arguments.batch_size]:
                try:
                    waveform = read_audio(recording.path, rate)
                except (ValueError, OSError) as error:
                    skipped += 1
                    tqdm.write(f"skipped: {error}", file=sys.stderr)
                    continue
                readable.append(recording)
                waveforms.append(waveform)
                if len(waveform) / rate < recording.seconds - 1:
                    tqdm.write(
                        f"warning: {recording.path} ends after {len(waveform) / rate:.1f} s of the "
                        f"{recording.seconds:.1f} s that its header says: it may be truncated",
                        file=sys.stderr,
                    )
            if not readable:
                continue
            languages = [recording.language for recording in readable]
            transcripts = transcribe(model, processor, waveforms, languages, arguments, progress)
            for recording, transcript in zip(readable, transcripts, strict=True):
                text = format_transcript(transcript, recording, arguments)
                if recording.output is None:
                    tqdm.write(f"{recording.path}: {' '.join(text.split())}")
                else:
                    write_whole(recording.output, text)
    return skipped


@torch.inference_mode()
def transcribe(
    model: WhisperForConditionalGeneration | PeftModel,
    processor: WhisperProcessor,
    waveforms: Sequence[np.ndarray],
    languages: Sequence[str | None],
    arguments: argparse.Namespace,
    progress: tqdm,
) -> list[Transcript]:
    """
    Transcribe a batch of recordings of any lengths and languages.

    Args:
        model (`WhisperForConditionalGeneration` or `PeftModel`): The model.
        processor (`WhisperProcessor`): Its processor.
        waveforms (`Sequence[np.ndarray]`): float32 [samples] at the processor's rate.
        languages (`Sequence[str]`): The code of each; `None` where it is to be detected.
        arguments (`argparse.Namespace`): `language`, to be detected among; `task`; `num_beams`.
        progress (`tqdm`): Is told the seconds of audio that are done.
    """
    extractor = processor.feature_extractor
    features, mask = make_features(waveforms, extractor, model.config.max_source_positions / POSITIONS_PER_SECOND)
    features, mask = features.to(model.device, model.dtype), mask.to(model.device)
    seconds = [len(waveform) / extractor.sampling_rate for waveform in waveforms]
    if None in languages:
        detected = detect_languages(model, features, arguments.language)
        languages = [given or heard for given, heard in zip(languages, detected, strict=True)]
    before = progress.n
    torch.manual_seed(0)  # the same batch gives the same text, also where it is sampled

    def show(frames: torch.Tensor) -> None:  # [recordings, 2]: those that are done of each, and all
        heard = frames[:, 0] * extractor.hop_length / extractor.sampling_rate
        progress.update(before + int(heard.minimum(torch.tensor(seconds)).sum()) - progress.n)

    outputs = model.generate(
        input_features=features,
        attention_mask=mask,
        language=languages,
        task=arguments.task,
        return_timestamps=True,
        return_segments=True,
        num_beams=arguments.num_beams,
        # A window whose text repeats itself is heard again, with samples ever farther from the most probable.
        temperature=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        compression_ratio_threshold=1.35,
        monitor_progress=show,
    )
    progress.update(before + round(sum(seconds)) - progress.n)
    adapters = getattr(model, "peft_config", {})
    return [
        Transcript(
            language=language,
            adapter=inference_adapter(adapters, language, active=None),
            seconds=length,
            segments=make_segments(segments, processor.tokenizer, length),
        )
        for language, length, segments in zip(languages, seconds, outputs["segments"], strict=True)
    ]


def make_features(
    waveforms: Sequence[np.ndarray], extractor: WhisperFeatureExtractor, context: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Features of recordings: those shorter than the context are padded with silence to it, as in training.

    Args:
        waveforms (`Sequence[np.ndarray]`): float32 [samples].
        extractor (`WhisperFeatureExtractor`): Its own context does not count.
        context (`float`): The model's, in seconds.

    Returns:
        `tuple`: features, float32 [recordings, mels, frames], and their mask, int64 [recordings, frames].
    """
    samples = round(context * extractor.sampling_rate)
    # One by one: what is computed on the way to the features of an hour of audio takes a gigabyte.
    each = [
        extractor(
            waveform, sampling_rate=extractor.sampling_rate, max_length=samples, truncation=False, return_tensors="pt"
        ).input_features[0]
        for waveform in waveforms
    ]
    lengths = torch.tensor([one.shape[-1] for one in each])
    longest = int(lengths.max())
    features = torch.stack([F.pad(one, (0, longest - one.shape[-1])) for one in each])
    return features, (torch.arange(longest) < lengths[:, None]).long()


def detect_languages(model: torch.nn.Module, features: torch.Tensor, candidates: Sequence[str]) -> list[str]:
    """The language that the base model hears at the start of each recording, among `candidates` or all."""
    config = copy.copy(model.generation_config)
    if candidates:
        config.lang_to_id = {token: config.lang_to_id[token] for token in (f"<|{code}|>" for code in candidates)}
    frames = model.config.max_source_positions * 2  # the second convolution has stride 2
    ids = model.detect_language(features, generation_config=config, num_segment_frames=frames)
    codes = {token_id: token[2:-2] for token, token_id in config.lang_to_id.items()}
    return [codes[token_id] for token_id in ids.tolist()]


def make_segments(
    segments: Sequence[dict[str, Any]], tokenizer: WhisperTokenizer, seconds: float
) -> list[dict[str, Any]]:
    """
    Segments with text, in order, without overlap, and within the recording.

    Args:
        segments (`Sequence[dict]`): What Whisper's `generate` gives for a recording.
        tokenizer (`WhisperTokenizer`): Decodes its tokens.
        seconds (`float`): Length of the recording.
    """
    made: list[dict[str, Any]] = []
    limit = seconds
    # From the last to the first: Whisper rounds ends up, past that of the recording, and past the start of its next
    # window.
    for segment in reversed(segments):
        text = tokenizer.decode(segment["tokens"], skip_special_tokens=True)
        start, end = (min(float(segment[name]), limit) for name in ("start", "end"))
        if not text.strip():
            continue
        if start < end:
            made.append({"start": start, "end": end, "text": text})
            limit = start
        elif made:  # no time of its own
            made[-1]["text"] = text + made[-1]["text"]
        # else it was heard in the silence after the end
    return made[::-1]


def format_transcript(transcript: Transcript, recording: Recording, arguments: argparse.Namespace) -> str:
    """The content of the file to write."""
    segments = [{**segment, "text": segment["text"].strip()} for segment in transcript.segments]
    if arguments.output_format == "json":
        content = {
            "file": str(recording.path),
            "seconds": round(transcript.seconds, 3),
            "language": transcript.language,
            "adapter": transcript.adapter,
            "task": arguments.task,
            # Segments bring their spaces, which not every script has.
            "text": "".join(segment["text"] for segment in transcript.segments).strip(),
            "segments": [
                {"start": round(segment["start"], 3), "end": round(segment["end"], 3), "text": segment["text"]}
                for segment in segments
            ],
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    if arguments.output_format == "text":
        return "\n".join(segment["text"] for segment in segments) + "\n"
    subtitles = pysubs2.SSAFile()
    for segment in segments:
        text = html.escape(segment["text"], quote=False) if arguments.output_format == "vtt" else segment["text"]
        start, end = (round(1000 * segment[name]) for name in ("start", "end"))
        subtitles.append(pysubs2.SSAEvent(start=start, end=end, text=text))
    return subtitles.to_string(arguments.output_format, keep_ssa_tags=True)  # or "{...}" in the text is lost


def write_whole(path: Path, text: str) -> None:
    """Write a file, so that there is all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    unfinished.replace(path)


if __name__ == "__main__":
    sys.exit(main())
