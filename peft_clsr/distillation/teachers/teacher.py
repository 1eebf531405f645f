"""A teacher of any kind, and its targets for a batch."""

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

# The collator's inputs for the teacher only.
TEACHER_INPUTS = ("teacher_states", "teacher_input_features", "teacher_labels")


class Teacher:
    """
    A teacher: another Whisper, its cached states, or the student's own base.

    Args:
        teacher (`nn.Module` or [`TeacherStates`]):
            A model is frozen and put into evaluation mode. If it is the student, the shared FFNs alone teach.
        student ([`~peft.PeftModel`]): The student.
        processor (`WhisperProcessor`, *optional*): The student's processor, to compare vocabularies.
        teacher_processor (`WhisperProcessor`, *optional*): The teacher's processor.

    Raises:
        ValueError: the vocabularies differ, and the processors that match them are missing; the student is its own
            teacher and trains parts of its base; states were cached for other labels.
    """

    def __init__(self, teacher: nn.Module | TeacherStates, student: PeftModel, processor: Any, teacher_processor: Any):
        self.student = student
        self.states = teacher if isinstance(teacher, TeacherStates) else None
        self.is_student = teacher is student or teacher is student.get_base_model()
        self.model = student if self.is_student else teacher
        self.vocabulary: VocabularyMap | None = None  # None: as the student's
        self.output_layer: nn.Module | None = None  # None: the student's
        if self.is_student:
            if any(config.modules_to_save for config in student.peft_config.values()):
                raise ValueError(
                    "the student is its own teacher, but modules_to_save trains parts of its base: load the teacher "
                    "as a second model, or leave modules_to_save out"
                )
            return
        if self.states is None:
            teacher.requires_grad_(False).eval()
            self.output_layer = output_layer(teacher)
        else:
            self.output_layer = teacher.output_layer
            teacher_processor = teacher_processor or teacher.processor
        ours, theirs = output_layer(student).out_features, self.output_layer.out_features
        if processor is not None and teacher_processor is not None:
            tokenizers = (getattr(one, "tokenizer", one) for one in (processor, teacher_processor))
            vocabulary = VocabularyMap.between(*tokenizers)
            self.vocabulary = None if vocabulary.is_identity and ours == theirs else vocabulary
        elif ours != theirs:
            raise ValueError(
                f"the teacher has a vocabulary of {theirs} tokens, the student of {ours}: give teacher_processor= and "
                "processing_class= (the student's), so that tokens can be matched by their strings"
            )
        has_same_ids = self.vocabulary is None or self.vocabulary.is_identity
        if self.states is not None and not has_same_ids and "teacher_labels" not in self.states.dataset.column_names:
            raise ValueError(
                "the teacher has another vocabulary than the student, but its states were cached for the student's "
                "label ids: prepare the dataset with prepare_dataset(teacher_processor=...) and cache them again"
            )

    def to(self, device: torch.device) -> None:
        """Move the teacher to a device, unless it has a `device_map`."""
        module = self.model if self.states is None else self.output_layer
        if not self.is_student and getattr(module, "hf_device_map", None) is None:
            module.to(device)

    def targets(
        self,
        input_features: torch.Tensor,
        labels: torch.Tensor,
        is_training: bool,
        teacher_states: torch.Tensor | None = None,
        teacher_input_features: torch.Tensor | None = None,
        teacher_labels: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
    ) -> TeacherTargets | None:
        """
        The teacher's targets at the label positions of a batch; `None` in evaluation if states are cached, but the
        batch has none.

        Args:
            input_features (`torch.Tensor`): [batch, mels, frames], the student's.
            labels (`torch.Tensor`): int64 [batch, tokens], the student's.
            is_training (`bool`): True if missing states are an error.
            teacher_states (`torch.Tensor`, *optional*): [batch, tokens, teacher hidden], from the cache.
            teacher_input_features (`torch.Tensor`, *optional*): [batch, teacher mels, teacher frames]
            teacher_labels (`torch.Tensor`, *optional*): int64 [batch, tokens], in the teacher's vocabulary.
            decoder_input_ids (`torch.Tensor`, *optional*):
                int64 [batch, tokens], the student's, where they are not its labels shifted right.

        Raises:
            ValueError: the batch has no states, states of another teacher, or features of another shape.
        """
        if teacher_labels is None:
            teacher_labels = labels if self.vocabulary is None else self.vocabulary.teacher_labels(labels)
        if self.states is None:
            features = input_features if teacher_input_features is None else teacher_input_features
            states = self._decoder_states(features, teacher_labels, self._ids_of_teacher(decoder_input_ids))
        elif teacher_states is not None:
            states = teacher_states
            if states.shape[-1] != self.states.hidden_size:
                raise ValueError(
                    f"the batch has teacher states of size {states.shape[-1]}, the teacher's have size "
                    f"{self.states.hidden_size}: they are another teacher's. Train on states.dataset"
                )
        elif is_training:
            raise ValueError(
                "the batch has no 'teacher_states': train on the dataset that cache_teacher_states returned "
                "(train_dataset=states.dataset), with a collator that keeps them"
            )
        else:
            return None
        is_label = labels != -100
        states = states.to(labels.device)[is_label]
        if self.vocabulary is None:
            return TeacherTargets(states, self.output_layer)
        ids = self.vocabulary.student_ids, self.vocabulary.teacher_ids
        return TeacherTargets(states, self.output_layer, *ids, mask=(teacher_labels != -100)[is_label])

    def _ids_of_teacher(self, decoder_input_ids: torch.Tensor | None) -> torch.Tensor | None:
        if decoder_input_ids is None or self.vocabulary is None:
            return decoder_input_ids
        ids: Any = self.vocabulary.teacher_labels(decoder_input_ids)
        return ids.masked_fill(ids == -100, self.model.config.pad_token_id)

    def _decoder_states(
        self, input_features: torch.Tensor, labels: torch.Tensor, decoder_input_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the teacher: decoder states [batch, tokens, teacher hidden]."""
        config = self.model.config
        mels, positions = input_features.shape[1], input_features.shape[2] // FRAMES_PER_POSITION
        if (mels, positions) != (config.num_mel_bins, config.max_source_positions):
            raise ValueError(
                f"the teacher takes {config.num_mel_bins} mel bins and {config.max_source_positions} positions of 20 "
                f"ms, and the batch has {mels} and {positions}: give teacher_processor= to the collator or to "
                "prepare_dataset, which add the teacher's features, or cut the teacher's context to the student's "
                "with set_audio_context(teacher, None, seconds)"
            )
        if not self.is_student:
            return teacher_decoder_states(self.model, input_features, labels, decoder_input_ids)
        with evaluation_mode(self.student), self.student.base_model.route_samples([BASE] * len(labels)):
            return teacher_decoder_states(self.student, input_features, labels, decoder_input_ids)
