"""Columns of a dataset that are for the teacher alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .vocabulary import VocabularyMap

STATES_COLUMN = "teacher_states"


class TeacherColumns:
    """
    What a teacher takes in place of the student's features and labels, where it has others: other mel bins and another
    vocabulary (large-v3 and turbo), or a longer context.

    Args:
        processor (`WhisperProcessor`): The student's.
        teacher_processor (`WhisperProcessor`): The teacher's.

    Raises:
        ValueError: the teacher has the shorter context, or a vocabulary of another kind.
    """

    def __init__(self, processor: Any, teacher_processor: Any) -> None:
        ours, theirs = processor.feature_extractor, teacher_processor.feature_extractor
        seconds = [extractor.n_samples / extractor.sampling_rate for extractor in (ours, theirs)]
        if seconds[1] < seconds[0]:
            raise ValueError(
                f"the teacher's processor has a context of {seconds[1]:g} s, shorter than the student's of "
                f"{seconds[0]:g} s, so it would not hear all: cut the student's too, with "
                f"set_audio_context(student, processor, {seconds[1]:g})"
            )
        vocabulary = VocabularyMap.between(processor.tokenizer, teacher_processor.tokenizer)
        self.vocabulary = None if vocabulary.is_identity else vocabulary
        same = (theirs.feature_size, theirs.n_samples) == (ours.feature_size, ours.n_samples)
        self.extractor = None if same else theirs

    def of(self, samples: np.ndarray, labels: list[int]) -> dict[str, Any]:
        """
        Args:
            samples (`np.ndarray`): float32 [samples], no longer than the context.
            labels (`list[int]`): Ids of the student.

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
    The teacher's states of one example.

    Args:
        cell: The example's `teacher_states`: numbers [tokens · hidden], in any format of `datasets`.
        num_tokens (`int`): Its label positions, without a leading `<|startoftranscript|>`.

    Returns:
        `torch.Tensor`: float16 [tokens, hidden].
    """
    return torch.as_tensor(cell, dtype=torch.float16).view(num_tokens, -1)
