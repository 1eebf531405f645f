"""Columns of a dataset that are for the teacher alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..whisper import context_seconds
from .vocabulary import VocabularyMap

STATES_COLUMN = "teacher_states"


class TeacherColumns:
    """
    Computes the teacher's features and labels where they differ from the student's: other mel bins and another
    vocabulary (large-v3 and turbo), or a longer context.

    Args:
        processor (`WhisperProcessor`): The student's.
        teacher_processor (`WhisperProcessor`): The teacher's.

    Raises:
        ValueError: the teacher has the shorter context, or its vocabulary is not that of a Whisper.
    """

    def __init__(self, processor: Any, teacher_processor: Any) -> None:
        student, teacher = processor.feature_extractor, teacher_processor.feature_extractor
        student_seconds, teacher_seconds = context_seconds(student), context_seconds(teacher)
        if teacher_seconds < student_seconds:
            raise ValueError(
                f"the teacher's processor has a context of {teacher_seconds:g} s, shorter than the student's of "
                f"{student_seconds:g} s, so it would miss audio: cut the student's context too, with "
                f"set_audio_context(student, processor, {teacher_seconds:g})"
            )
        vocabulary = VocabularyMap.between(processor.tokenizer, teacher_processor.tokenizer)
        self.vocabulary = None if vocabulary.is_identity else vocabulary
        is_same = (teacher.feature_size, teacher.n_samples) == (student.feature_size, student.n_samples)
        self.extractor = None if is_same else teacher

    def compute(self, samples: np.ndarray, labels: list[int]) -> dict[str, Any]:
        """
        Compute the columns of one example.

        Args:
            samples (`np.ndarray`): float32 [samples], no longer than the context.
            labels (`list[int]`): Token ids of the student.

        Returns:
            `dict`: `teacher_input_features` float32 [teacher's mels, frames], where mel bins or contexts differ, and
            `teacher_labels` [tokens], -100 for tokens that the teacher lacks, where vocabularies differ.
        """
        columns = {}
        if self.extractor is not None:
            inputs = self.extractor(samples, sampling_rate=self.extractor.sampling_rate, return_tensors="np")
            columns["teacher_input_features"] = inputs["input_features"][0]
        if self.vocabulary is not None:
            columns["teacher_labels"] = self.vocabulary.teacher_labels(labels)
        return columns


def unflatten_states(cell: Any, num_tokens: int) -> torch.Tensor:
    """
    The teacher's decoder states of one example.

    Args:
        cell: The example's `teacher_states`: numbers [tokens · hidden], in any format of `datasets`.
        num_tokens (`int`): Its label positions, without a leading `<|startoftranscript|>`.

    Returns:
        `torch.Tensor`: float16 [tokens, hidden].
    """
    return torch.as_tensor(cell, dtype=torch.float16).view(num_tokens, -1)
