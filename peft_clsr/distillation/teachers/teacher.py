"""A teacher of any kind, as the trainer uses it: it gives the targets for a batch."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ...data.vocabulary import VocabularyMap
from ...evaluation.mode import evaluation_mode
from ...tuner.adapter_names import BASE
from ...whisper import FRAMES_PER_POSITION
from ..losses import TeacherTargets
from ..output_layer import output_layer
from .cache import TeacherStates
from .forward import teacher_decoder_states

# Entries of a batch that are for the teacher alone.
TEACHER_INPUTS = ("teacher_states", "teacher_input_features", "teacher_labels")


class Teacher:
    """
    A student's teacher: another Whisper, its cached states, or the student's own base.

    Args:
        teacher (`nn.Module` or [`TeacherStates`]): A model is frozen and put into evaluation mode.
        student ([`~peft.PeftModel`]): The student. If it is also the `teacher`, only its shared FFNs teach.
        processor (`WhisperProcessor`, *optional*): The student's, to compare vocabularies.
        teacher_processor (`WhisperProcessor`, *optional*): The teacher's.

    Raises:
        ValueError: the vocabularies differ and a processor is missing, or the student would teach itself weights that
            it trains.
    """

    def __init__(self, teacher: nn.Module | TeacherStates, student: PeftModel, processor: Any, teacher_processor: Any):
        self.student = student
        self.states = teacher if isinstance(teacher, TeacherStates) else None
        self.is_student = teacher is student or teacher is student.get_base_model()
        self.model = student if self.is_student else teacher
        self.vocabulary: VocabularyMap | None = None  # None: the student's
        self.output_layer: nn.Module | None = None  # None: the student's
        if self.is_student:
            if any(config.modules_to_save for config in student.peft_config.values()):
                raise ValueError(
                    "the student is its own teacher, but modules_to_save trains parts of its base: load the teacher "
                    "a second time, or leave modules_to_save out"
                )
            return
        if self.states is None:
            teacher.requires_grad_(False).eval()
            self.output_layer = output_layer(teacher)
        else:
            self.output_layer = teacher.output_layer
            teacher_processor = teacher_processor or teacher.processor
        student_size, teacher_size = output_layer(student).out_features, self.output_layer.out_features
        if processor is not None and teacher_processor is not None:
            tokenizers = (getattr(one, "tokenizer", one) for one in (processor, teacher_processor))
            vocabulary = VocabularyMap.between(*tokenizers)
            self.vocabulary = None if vocabulary.is_identity and student_size == teacher_size else vocabulary
        elif student_size != teacher_size:
            raise ValueError(
                f"the teacher has a vocabulary of {teacher_size} tokens, the student of {student_size}: give "
                "teacher_processor= and processing_class= (the student's), so that tokens are found by their strings"
            )
        same_ids = self.vocabulary is None or self.vocabulary.is_identity
        if self.states is not None and not same_ids and "teacher_labels" not in self.states.dataset.column_names:
            raise ValueError(
                "the teacher has another vocabulary than the student, but its states were cached with the student's "
                "label ids: prepare the dataset with prepare_dataset(teacher_processor=...) and cache them again"
            )

    def to(self, device: torch.device) -> None:
        """Move the teacher to a device, unless it is spread over devices already."""
        moved = self.model if self.states is None else self.output_layer
        if not self.is_student and getattr(moved, "hf_device_map", None) is None:
            moved.to(device)

    def targets(
        self,
        input_features: torch.Tensor,
        labels: torch.Tensor,
        is_training: bool,
        teacher_states: torch.Tensor | None = None,
        teacher_input_features: torch.Tensor | None = None,
        teacher_labels: torch.Tensor | None = None,
    ) -> TeacherTargets | None:
        """
        Compute the targets at the label positions of a batch. `None` in evaluation without cached states.

        Args:
            input_features (`torch.Tensor`): [batch, mels, frames], the student's.
            labels (`torch.Tensor`): int64 [batch, tokens], the student's.
            is_training (`bool`): True if cached states must be in the batch.
            teacher_states (`torch.Tensor`, *optional*): [batch, tokens, teacher hidden], from the cache.
            teacher_input_features (`torch.Tensor`, *optional*): [batch, teacher mels, teacher frames]
            teacher_labels (`torch.Tensor`, *optional*): int64 [batch, tokens], in the teacher's vocabulary.

        Raises:
            ValueError: the batch lacks inputs of this teacher, or has those of another one.
        """
        if teacher_labels is None:
            teacher_labels = labels if self.vocabulary is None else self.vocabulary.teacher_labels(labels)
        if self.states is None:
            features = input_features if teacher_input_features is None else teacher_input_features
            states = self._run(features, teacher_labels)
        elif teacher_states is not None:
            states = teacher_states
            if states.shape[-1] != self.states.hidden_size:
                raise ValueError(
                    f"the batch has teacher states of size {states.shape[-1]}, the teacher's have "
                    f"{self.states.hidden_size}: they are another teacher's. Train on states.dataset"
                )
        elif is_training:
            raise ValueError(
                "the batch has no 'teacher_states': train on the dataset of cache_teacher_states "
                "(train_dataset=states.dataset), and let the collator pass them on"
            )
        else:
            return None
        is_label = labels != -100
        states = states.to(labels.device)[is_label]
        if self.vocabulary is None:
            return TeacherTargets(states, self.output_layer)
        ids = self.vocabulary.student_ids, self.vocabulary.teacher_ids
        return TeacherTargets(states, self.output_layer, *ids, is_taught=(teacher_labels != -100)[is_label])

    def _run(self, input_features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The decoder states [batch, tokens, hidden] of a live teacher."""
        config = self.model.config
        size = input_features.shape[1], input_features.shape[2] // FRAMES_PER_POSITION
        if size != (config.num_mel_bins, config.max_source_positions):
            raise ValueError(
                f"the teacher takes {config.num_mel_bins} mel bins and {config.max_source_positions} positions of 20 "
                f"ms, and the batch has {size[0]} and {size[1]}: give teacher_processor= to the collator or to "
                "prepare_dataset, which compute the teacher's own features, or cut both models alike with "
                "set_audio_context(teacher, None, seconds)"
            )
        if not self.is_student:
            return teacher_decoder_states(self.model, input_features, labels)
        with evaluation_mode(self.student), self.student.base_model.route_samples([BASE] * len(labels)):
            return teacher_decoder_states(self.student, input_features, labels)
