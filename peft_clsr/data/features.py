"""Features of one example, for the student and its teacher."""

from __future__ import annotations

from typing import Any

import numpy as np

from .teacher_columns import TeacherColumns


def example_features(
    samples: np.ndarray, labels: list[int], processor: Any, teacher_columns: TeacherColumns | None = None
) -> dict[str, Any]:
    """
    Compute what a prepared example holds for the models.

    Args:
        samples (`np.ndarray`): float32 [samples] at the processor's rate, at most as long as its context.
        labels (`list[int]`): Token ids of the student, see [`encode_labels`].
        processor (`WhisperProcessor`): The student's.
        teacher_columns ([`TeacherColumns`], *optional*): Adds the columns of a teacher.

    Returns:
        `dict`: `input_features` float32 [mels, frames], `attention_mask` int8 [frames] (1 for audio, 0 for padding),
        `labels` [tokens], and the teacher's columns.
    """
    extractor = processor.feature_extractor
    inputs = extractor(samples, sampling_rate=extractor.sampling_rate, return_attention_mask=True, return_tensors="np")
    return {
        "input_features": inputs["input_features"][0],
        "attention_mask": inputs["attention_mask"][0].astype(np.int8),
        "labels": labels,
        **({} if teacher_columns is None else teacher_columns.compute(samples, labels)),
    }
