"""Transcribes recordings with a teacher, to train on its transcripts."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import PartialState
from peft.utils import infer_device
from torch import nn
from tqdm.auto import tqdm

from ...data.audio import audio_seconds, read_audio
from ...data.rows import TEXT_COLUMN, files_digest, without_decoding
from ...evaluation.error_rates import error_rates
from ...evaluation.mode import evaluation_mode
from ...files import read_json, to_json, write_text
from ...inference.transcribe import transcribe_speech, transcribe_waveforms
from ...languages.tags import language_tag
from ...multilingual import check_model_languages
from ..teachers.forward import teacher_hash
from .rows import label_rows
from .scores import score_segments

logger = logging.getLogger(__name__)

_SETTINGS, _LABELS = "settings.json", "labels-{}.jsonl"


def pseudo_label(
    dataset: datasets.Dataset,
    teacher: nn.Module,
    processor: Any,
    language: str,
    *,
    output_dir: str | os.PathLike[str],
    audio_column: str = "audio",
    text_column: str = TEXT_COLUMN,
    batch_size: int = 8,
    num_beams: int = 1,
    vad: bool = False,
) -> datasets.Dataset:
    """
    Transcribe recordings of any length with a teacher.

    Each finished batch is written to `output_dir`. A call with the same recordings, teacher and settings goes on where
    an earlier one was killed, or opens what is complete. Under `accelerate launch`, each process transcribes its
    share.

    Args:
        dataset (`datasets.Dataset`):
            Recordings, as for [`prepare_dataset`]. Those with a transcript are transcribed, too, and compared with it.
        teacher (`WhisperForConditionalGeneration` or `PeftModel`): Any Whisper, with experts or without.
        processor (`WhisperProcessor`): The teacher's.
        language (`str`): The language of all recordings, as in [`language_tag`]. It chooses the expert.
        output_dir (`str` or `os.PathLike`): Folder of the labels: one for each dataset, teacher and language.
        audio_column (`str`, *optional*, defaults to `"audio"`): Column of audio, as in [`read_audio`].
        text_column (`str`, *optional*, defaults to `"transcription"`): Column of transcripts, if there is one.
        batch_size (`int`, *optional*, defaults to 8): Recordings at a time.
        num_beams (`int`, *optional*, defaults to 1): Beams of the search.
        vad (`bool`, *optional*, defaults to `False`): Hear only speech, cut at pauses, by silero-vad (extra `vad`).

    Returns:
        `datasets.Dataset`: rows to train on, for `pack_utterances` and [`filter_pseudo_labels`]: one for each
        recording of up to 30 s, and one for each segment of a longer one, with `start` and `end` in seconds. They have
        the columns of `dataset`, the teacher's transcript in `transcription`, `reference` (the given transcript),
        `log_probability`, `compression_ratio` and `no_speech_probability` (see [`score_segments`]), `wer` (that of the
        recording, a fraction, where there is a transcript), `seconds`, and `recording` (the row in `dataset`).
        Recordings that cannot be read, or that the teacher hears nothing in, have none; warnings count them.

    Raises:
        ValueError: the dataset is empty or lacks the column; the teacher cannot be told the language; `output_dir` has
            labels of other recordings, of another teacher or of other settings; the teacher hears nothing in any
            recording, or none can be read.

    Example:

    ```py
    >>> labels = pseudo_label(recordings, teacher, processor, "ro", output_dir="labels")
    >>> labels, removed = filter_pseudo_labels(labels, min_log_probability=-0.5)
    >>> train_set = pack_utterances(labels, processor, "ro")
    ```
    """
    folder, process = Path(output_dir), PartialState(cpu=infer_device() == "cpu")
    if not len(dataset):
        raise ValueError("the dataset is empty: check the split, and what filtered it")
    if audio_column not in dataset.column_names:
        raise ValueError(
            f"the dataset has no column {audio_column!r}; it has {', '.join(map(repr, dataset.column_names))}: set "
            "audio_column to one of them"
        )
    check_model_languages(teacher)
    dataset = without_decoding(dataset, audio_column)
    settings = {
        "recordings": len(dataset),
        "files": files_digest(dataset, audio_column),
        "teacher": teacher_hash(teacher),
        "language": language_tag(language),
        "num_beams": num_beams,
        "vad": vad,
    }
    with process.main_process_first():
        _open_folder(folder, settings)
    done = _read_labels(folder)
    pending = [row for row in range(len(dataset)) if row not in done]
    with evaluation_mode(teacher):
        labeller = _Labeller(teacher, processor, language_tag(language), num_beams, vad, audio_column, text_column)
        labeller.label(
            dataset,
            pending[process.process_index :: process.num_processes],
            batch_size,
            folder / _LABELS.format(process.process_index),
        )
    process.wait_for_everyone()
    return label_rows(dataset, _checked(_read_labels(folder), len(dataset)), audio_column, text_column)


class _Labeller:
    def __init__(
        self,
        teacher: Any,
        processor: Any,
        language: str,
        num_beams: int,
        vad: bool,
        audio_column: str,
        text_column: str,
    ) -> None:
        self.teacher, self.processor, self.language = teacher, processor, language
        self.num_beams = num_beams
        self.transcribe = transcribe_speech if vad else transcribe_waveforms
        self.audio_column, self.text_column = audio_column, text_column

    def label(self, dataset: datasets.Dataset, rows: Sequence[int], batch_size: int, path: Path) -> None:
        """Transcribe rows, and append a line of JSON for each to a file."""
        if not rows:
            return
        audio = dataset.select_columns([self.audio_column])
        lengths = {row: self._seconds(audio[row]) for row in rows}
        # With the longest first, batches are even, and a lack of memory shows at once.
        rows = sorted(rows, key=lengths.__getitem__, reverse=True)
        total = round(sum(lengths.values()))
        with path.open("a", encoding="utf-8") as file, tqdm(total=total, desc="pseudo-labels", unit="s") as progress:
            for first in range(0, len(rows), batch_size):
                batch = rows[first : first + batch_size]
                for label in self._labels(dataset, batch, progress):
                    file.write(to_json(label, indent=None))
                file.flush()
                os.fsync(file.fileno())

    def _seconds(self, row: dict[str, Any]) -> float:
        try:
            return audio_seconds(row[self.audio_column])
        except ValueError:
            return 0.0  # it is named when its turn comes

    def _labels(self, dataset: datasets.Dataset, rows: Sequence[int], progress: tqdm) -> Iterator[dict[str, Any]]:
        rate = self.processor.feature_extractor.sampling_rate
        waveforms: dict[int, np.ndarray] = {}
        for row in rows:
            try:
                waveforms[row] = read_audio(dataset[row][self.audio_column], rate)
            except (ValueError, OSError) as error:
                logger.warning("left out: item %d: %s", row, error)
                yield {"row": row, "problem": str(error)}
        if not waveforms:
            return
        transcripts = self.transcribe(
            self.teacher,
            self.processor,
            list(waveforms.values()),
            [self.language] * len(waveforms),
            num_beams=self.num_beams,
            progress=progress,
        )
        for (row, waveform), transcript in zip(waveforms.items(), transcripts, strict=True):
            scores = score_segments(self.teacher, self.processor, waveform, transcript.segments, self.language)
            segments = [{**one, **score} for one, score in zip(transcript.segments, scores, strict=True)]
            label = {"row": row, "seconds": round(transcript.seconds, 3), "text": transcript.text}
            reference = dataset[row].get(self.text_column)
            if isinstance(reference, str) and reference.strip():
                rates = error_rates([transcript.text], [reference], language=self.language)[self.language]
                label["wer"] = rates[rates["rate"]]
            yield {**label, "segments": segments}


def _open_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of new labels, or compare them with those of earlier ones."""
    path = folder / _SETTINGS
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.glob("labels-*.jsonl"))):
            raise ValueError(f"output_dir {folder} is not a folder of labels: give another one")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, to_json(settings))
        return
    found = read_json(path)
    names = {"recordings": "number of recordings", "files": "audio files"}
    other = [names.get(key, key) for key, value in settings.items() if found.get(key) != value]
    if other:
        raise ValueError(
            f"output_dir {folder} has labels with another {' and '.join(other)}: give another folder, or remove it"
        )


def _read_labels(folder: Path) -> dict[int, dict[str, Any]]:
    """The labels of all processes, by row. A last line that was not written whole does not count."""
    labels = {}
    for path in sorted(folder.glob(_LABELS.format("*"))):
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for line in whole.splitlines():
            label = json.loads(line)
            labels[label["row"]] = label
    return labels


def _checked(labels: dict[int, dict[str, Any]], recordings: int) -> dict[int, dict[str, Any]]:
    """The labels with text. Warns of the others, and raises a `ValueError` if there are no more."""
    unreadable = [label for label in labels.values() if "problem" in label]
    heard = {row: label for row, label in sorted(labels.items()) if label.get("segments")}
    silent = recordings - len(unreadable) - len(heard)
    if not heard:
        example = f", such as {unreadable[0]['problem']}" if unreadable else ""
        raise ValueError(
            f"the teacher gave no text for any of the {recordings} recordings ({len(unreadable)} cannot be read"
            f"{example}; in {silent} it hears nothing): check the language, the teacher and the audio"
        )
    for number, what in ((len(unreadable), "cannot be read"), (silent, "have no text, the teacher hears nothing")):
        if number:
            logger.warning("%d of %d recordings %s; they have no rows", number, recordings, what)
    return heard
