"""Transcribes recordings with a teacher, to train on its transcripts."""

from __future__ import annotations

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

from ...data.audio import audio_seconds
from ...data.rows import TEXT_COLUMN, text_column_of, without_decoding
from ...data.segments import read_row, segment_times
from ...evaluation.mode import evaluation_mode
from ...files import to_json
from ...inference.generation import clsr_adapters, language_and_prompt
from ...inference.transcribe import transcribe_speech, transcribe_waveforms
from ...languages.tags import language_tag
from ...multilingual import check_model_languages
from ..disks import processes_on_disk
from ..teachers.forward import teacher_hash
from .folder import audio_digest, labels_file, open_folder, read_labels
from .rows import label_rows
from .scores import score_segments

logger = logging.getLogger(__name__)


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
            Only the part from `start` to `end` is heard of a row that has them.
        teacher (`WhisperForConditionalGeneration` or `PeftModel`): Any Whisper, with experts or without.
        processor (`WhisperProcessor`): The teacher's.
        language (`str`): The language of all recordings, as in [`language_tag`]. It chooses the expert.
        output_dir (`str` or `os.PathLike`):
            Folder of the labels, new or empty at first: one for each dataset, teacher and language.
        audio_column (`str`, *optional*, defaults to `"audio"`): Column of audio, as in [`read_audio`].
        text_column (`str`, *optional*, defaults to `"transcription"`): Column of transcripts, if there is one. Also
            `"text"` is found.
        batch_size (`int`, *optional*, defaults to 8): Recordings at a time.
        num_beams (`int`, *optional*, defaults to 1): Beams of the search.
        vad (`bool`, *optional*, defaults to `False`): Hear only speech, cut at pauses, by silero-vad (extra `vad`).

    Returns:
        `datasets.Dataset`: rows to train on, for `pack_utterances` and [`filter_pseudo_labels`]: one for each
        recording of up to 30 s, and one for each segment of a longer one, with `start` and `end` in seconds. They have
        the columns of `dataset` as they were, the teacher's transcript in `transcription`, `reference` (the given
        transcript), `log_probability`, `compression_ratio` and `no_speech_probability` (see [`score_segments`]), `wer`
        (that of the recording, a fraction, where there is a transcript), `seconds`, and `recording` (the row in
        `dataset`). A score is `None` where it could not be computed: the decoder's limit cuts the text, or a
        half-precision overflow.
        Recordings that cannot be read, or that the teacher hears nothing in, have none; warnings count them.

    Raises:
        ValueError: the dataset is empty or lacks the column; the teacher cannot be told the language; `output_dir` has
            labels of other recordings, of another teacher or of other settings, or files that are no labels; the
            teacher hears nothing in any recording, or none can be read.

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
    if text_column != TEXT_COLUMN and text_column not in dataset.column_names:
        raise ValueError(
            f"the dataset has no column {text_column!r} of transcripts; it has "
            f"{', '.join(map(repr, dataset.column_names))}: leave text_column out if there are none"
        )
    text_column = text_column_of(dataset.column_names, text_column)
    check_model_languages(teacher)
    _check_language(teacher, language)
    given, dataset = dataset.with_format(None), without_decoding(dataset, audio_column)
    settings = {
        "recordings": len(dataset),
        "audio": audio_digest(dataset, audio_column),
        "teacher": teacher_hash(teacher),
        "language": language_tag(language),
        "num_beams": num_beams,
        "vad": vad,
    }
    if len(processes_on_disk(folder, process)) < process.num_processes:
        raise ValueError(
            f"the machines do not share {folder}, where each process writes the labels that it has heard: give a "
            "folder that all see, or transcribe on one machine"
        )
    with process.main_process_first():
        open_folder(folder, settings)
        done = read_labels(folder)
    # Nobody writes before all have read: a line that another process is writing is not one of a killed run.
    process.wait_for_everyone()
    pending = [row for row in range(len(dataset)) if row not in done]
    with evaluation_mode(teacher):
        labeller = _Labeller(teacher, processor, language_tag(language), num_beams, vad, audio_column)
        labeller.label(
            dataset,
            pending[process.process_index :: process.num_processes],
            batch_size,
            labels_file(folder, process.process_index),
        )
    process.wait_for_everyone()
    labels = _checked(read_labels(folder), len(dataset))
    return label_rows(given, labels, text_column, language_tag(language))


def _check_language(teacher: Any, language: str) -> None:
    """Raise a `ValueError` if the teacher cannot be told the language, before anything is written."""
    tokens = teacher.generation_config.lang_to_id
    tag, prompt = language_and_prompt(language, tokens, clsr_adapters(teacher), None)
    if f"<|{prompt}|>" not in tokens:
        raise ValueError(
            f"the teacher has no token <|{prompt}|> for the language {tag!r}: take a Whisper that has it, or name "
            f"another language to transcribe it as (the teacher knows {', '.join(token[2:-2] for token in tokens)})"
        )


class _Labeller:
    def __init__(
        self,
        teacher: Any,
        processor: Any,
        language: str,
        num_beams: int,
        vad: bool,
        audio_column: str,
    ) -> None:
        self.teacher, self.processor, self.language = teacher, processor, language
        self.num_beams = num_beams
        self.transcribe = transcribe_speech if vad else transcribe_waveforms
        self.audio_column = audio_column

    def label(self, dataset: datasets.Dataset, rows: Sequence[int], batch_size: int, path: Path) -> None:
        """Transcribe rows, and append a line of JSON for each to a file."""
        if not rows:
            return
        lengths = {row: self._seconds(dataset[row]) for row in rows}
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
            times = segment_times(row)
            return audio_seconds(row[self.audio_column]) if times is None else times[1] - times[0]
        except ValueError:
            return 0.0  # it is named when its turn comes

    def _labels(self, dataset: datasets.Dataset, rows: Sequence[int], progress: tqdm) -> Iterator[dict[str, Any]]:
        rate = self.processor.feature_extractor.sampling_rate
        waveforms: dict[int, np.ndarray] = {}
        starts: dict[int, float | None] = {}
        for row in rows:
            cells = dataset[row]
            try:
                waveforms[row] = read_row(cells, self.audio_column, rate)
                starts[row] = (segment_times(cells) or (None,))[0]
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
            offset = starts[row] or 0.0  # times count from the beginning of the recording
            segments = [
                {**one, "start": offset + one["start"], "end": offset + one["end"], **score}
                for one, score in zip(transcript.segments, scores, strict=True)
            ]
            part = {"start": starts[row], "seconds": round(transcript.seconds, 3)}
            yield {"row": row, **part, "text": transcript.text, "segments": segments}


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
