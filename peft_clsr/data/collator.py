"""Batches of speech and transcripts for Whisper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..languages import language_code
from .audio import audio_name, read_audio
from .labels import MAX_LABEL_LENGTH, encode_labels
from .teacher_columns import TeacherColumns, unflatten_states


@dataclass
class DataCollatorSpeechSeq2SeqWithPadding:
    """
    Make a batch for Whisper, from prepared examples (`prepare_dataset`) or raw ones (audio and text).

    Args:
        processor (`WhisperProcessor`): Its feature extractor pads audio to its context; its tokenizer encodes text.
        language (`str`, *optional*): Name or code of the language of examples that have no `language_column`.
        task (`str`, *optional*, defaults to `"transcribe"`): "transcribe" or "translate", for raw examples.
        audio_column (`str`, *optional*, defaults to `"audio"`): Audio of raw examples, as `read_audio` takes it.
        text_column (`str`, *optional*, defaults to `"text"`): Transcript of raw examples.
        language_column (`str`, *optional*, defaults to `"language"`): Language of each example, where it is there.
        max_label_length (`int`, *optional*, defaults to 448): What the decoder allows, in tokens.
        teacher_processor (`WhisperProcessor`, *optional*):
            The teacher's, where it may have other mel bins or another vocabulary than the student (large-v3, turbo),
            or a longer context.

    Raises:
        ValueError: an unknown language; a teacher of a shorter context.

    Example:

    ```py
    >>> collator = DataCollatorSpeechSeq2SeqWithPadding(processor, language="ca")
    >>> batch = collator([{"audio": "one.wav", "text": "Bon dia"}, {"audio": "two.ogg", "text": "Bona nit a tothom"}])
    >>> batch["input_features"].shape
    torch.Size([2, 80, 3000])
    ```
    """

    processor: Any
    language: str | None = None
    task: str = "transcribe"
    audio_column: str = "audio"
    text_column: str = "text"
    language_column: str = "language"
    max_label_length: int = MAX_LABEL_LENGTH
    teacher_processor: Any | None = None

    def __post_init__(self):
        if self.language is not None:
            self.language = language_code(self.language)
        self._teacher = None
        if self.teacher_processor is not None:
            self._teacher = TeacherColumns(self.processor, self.teacher_processor)
        self._start = self.processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor | list[str]]:
        """
        Args:
            features (`list[dict]`):
                Examples with `input_features` [mels, frames] and `labels` [tokens] (and `attention_mask` [frames]; all
                ones without), or with audio and text. Both kinds may stand in one batch. Labels that begin with
                `<|startoftranscript|>` lose it, as the model prepends it.

        Returns:
            `dict`: `input_features` float32 [batch, mels, frames]; `attention_mask` int64 [batch, frames], 1 for audio
            and 0 for padding, which the tuner leaves out of the gate budget (Whisper itself ignores it); `labels`
            int64 [batch, tokens], padded with -100. Where examples or the collator have a language, `language`, a list
            of codes. For a teacher: `teacher_input_features` float32 [batch, teacher's mels, frames], where its own
            differ; `teacher_labels` int64 [batch, tokens], the labels in its vocabulary (-100 for tokens that it
            lacks), where that differs. Where examples have `teacher_states`, its decoder states at each label, these
            come in place of the features: float16 [batch, tokens, hidden], padded with zeros.

        Raises:
            ValueError: labels longer than `max_label_length`; audio that is empty, unreadable or longer than the
                context; a raw example without audio, text or language; a column that only some examples have;
                prepared examples without the features that the teacher needs; `teacher_states` of another number of
                tokens than `labels`.
        """
        examples = [feature if "input_features" in feature else self._prepare(feature) for feature in features]
        input_features = [torch.as_tensor(example["input_features"], dtype=torch.float32) for example in examples]
        attention_mask = [
            torch.as_tensor(example["attention_mask"], dtype=torch.long)
            if "attention_mask" in example
            else torch.ones(inputs.shape[-1], dtype=torch.long)
            for example, inputs in zip(examples, input_features, strict=True)
        ]
        labels = [self._labels(example) for example in examples]
        batch = {
            "input_features": torch.stack(input_features),
            "attention_mask": torch.stack(attention_mask),
            "labels": _pad_labels(labels),
        }
        languages = [example.get(self.language_column) or self.language for example in features]
        if any(languages):
            _check_complete("language", languages, "fill the column or give the collator language=... (such as 'ca')")
            batch["language"] = [language_code(language) for language in languages]
        return batch | self._for_teacher(examples, labels)

    def _labels(self, example: dict[str, Any]) -> torch.Tensor:
        if "labels" not in example:
            raise ValueError(f"an example with 'input_features' has no 'labels'; it has {sorted(example)}")
        labels = torch.as_tensor(example["labels"], dtype=torch.long)
        if len(labels) and labels[0] == self._start:
            labels = labels[1:]
        if len(labels) > self.max_label_length:
            raise ValueError(
                f"labels of {len(labels)} tokens are longer than the decoder's limit of {self.max_label_length}: drop "
                "such examples (prepare_dataset does, and counts them) or split their audio and text"
            )
        return labels

    def _for_teacher(self, examples: list[dict[str, Any]], labels: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """What a batch has for the teacher, of examples and their labels [tokens]."""
        batch, teacher = {}, self._teacher
        states = [example.get("teacher_states") for example in examples]
        heard = [example.get("teacher_input_features") for example in examples]
        if any(cell is not None for cell in states):
            _check_complete("teacher_states", states, "cache the teacher's states of the whole dataset")
            states = [_states(cell, len(own)) for cell, own in zip(states, labels, strict=True)]
            batch["teacher_states"] = pad_sequence(states, batch_first=True)
        elif any(one is not None for one in heard) or (teacher is not None and teacher.extractor is not None):
            _check_complete("teacher_input_features", heard, "prepare it with prepare_dataset(teacher_processor=...)")
            batch["teacher_input_features"] = torch.stack([torch.as_tensor(one, dtype=torch.float32) for one in heard])
        if teacher is not None and teacher.vocabulary is not None:
            batch["teacher_labels"] = teacher.vocabulary.teacher_labels(_pad_labels(labels))
        return batch

    def _prepare(self, example: dict[str, Any]) -> dict[str, Any]:
        """Features and labels of a raw example."""
        for field, column in (("audio_column", self.audio_column), ("text_column", self.text_column)):
            if example.get(column) is None:
                raise ValueError(
                    f"an example has neither 'input_features' nor {column!r}; it has {sorted(example)}. Set the "
                    f"collator's {field}, and remove_unused_columns=False where a trainer drops the column"
                )
        language = example.get(self.language_column) or self.language
        if language is None:
            raise ValueError(
                f"an example has no language: give the collator language=... (such as 'ca') or the dataset a column "
                f"{self.language_column!r}"
            )
        extractor = self.processor.feature_extractor
        samples = read_audio(example[self.audio_column], extractor.sampling_rate)
        rate = extractor.sampling_rate
        if len(samples) > extractor.n_samples:
            # The extractor would cut it silently, and leave a transcript of more than can be heard.
            raise ValueError(
                f"audio {audio_name(example[self.audio_column])} lasts {len(samples) / rate:.1f} s, longer than the "
                f"context of {extractor.n_samples / rate:g} s: use prepare_dataset with "
                "long_audio='drop' or 'cut'"
            )
        inputs = extractor(
            samples, sampling_rate=extractor.sampling_rate, return_attention_mask=True, return_tensors="pt"
        )
        labels = encode_labels(self.processor.tokenizer, example[self.text_column], language, self.task)
        return {
            "input_features": inputs["input_features"][0],
            "attention_mask": inputs["attention_mask"][0],
            "labels": labels,
            **({} if self._teacher is None else self._teacher.of(samples, labels)),
        }


def _check_complete(column: str, values: list[Any], remedy: str) -> None:
    """Raise a `ValueError` that names the first example without a value."""
    for index, value in enumerate(values):
        if value is None:
            raise ValueError(f"example {index} of the batch has no {column!r}: {remedy}")


def _states(cell: Any, num_tokens: int) -> torch.Tensor:
    """The teacher's states [tokens, hidden] of one example, for as many labels."""
    shape = tuple(torch.as_tensor(cell).shape)
    if shape[0] != num_tokens if len(shape) == 2 else shape[0] % num_tokens:
        raise ValueError(
            f"'teacher_states' of shape {shape} are not one state for each of {num_tokens} labels: the labels were "
            "changed after the teacher's states were cached; cache them again"
        )
    return unflatten_states(cell, num_tokens)


def _pad_labels(labels: list[torch.Tensor]) -> torch.Tensor:
    return pad_sequence(labels, batch_first=True, padding_value=-100)
