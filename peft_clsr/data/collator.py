"""Batches of speech and transcripts for Whisper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..languages.tags import language_tag, prompt_code
from ..whisper import context_seconds
from .audio import audio_name
from .features import example_features
from .labels import MAX_LABEL_LENGTH, encode_labels
from .segments import read_row
from .teacher_columns import STATES_COLUMN, TeacherColumns, unflatten_states


@dataclass
class DataCollatorSpeechSeq2SeqWithPadding:
    """
    Makes a batch for Whisper from prepared examples ([`prepare_dataset`]) or raw ones (audio and text).

    Args:
        processor (`WhisperProcessor`): Its feature extractor pads audio to its context; its tokenizer encodes text.
        language (`str`, *optional*): Language of examples that have no `language_column`, as in [`language_tag`].
        task (`str`, *optional*, defaults to `"transcribe"`): "transcribe" or "translate", for raw examples.
        audio_column (`str`, *optional*, defaults to `"audio"`): Audio of raw examples, as `read_audio` takes it.
        text_column (`str`, *optional*, defaults to `"text"`): Transcript of raw examples.
        language_column (`str`, *optional*, defaults to `"language"`): Language of each example, if it has one.
        max_label_length (`int`, *optional*, defaults to 448): Longest labels that the decoder allows, in tokens.
        teacher_processor (`WhisperProcessor`, *optional*):
            The teacher's, if it may have other mel bins or another vocabulary than the student (large-v3, turbo), or a
            longer context.
        prompt_language (`str` or `Mapping[str, str]`, *optional*):
            For raw examples, as in [`prepare_dataset`].

    Raises:
        ValueError: an unknown language, or a teacher with a shorter context.

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
    prompt_language: str | Mapping[str, str] | None = None

    def __post_init__(self):
        if self.language is not None:
            self.language = language_tag(self.language)
        self._teacher_columns = None
        if self.teacher_processor is not None:
            self._teacher_columns = TeacherColumns(self.processor, self.teacher_processor)
        self._start_id = self.processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor | list[str]]:
        """
        Make a batch of examples, for student and teacher.

        Args:
            features (`list[dict]`):
                Examples with `input_features` [mels, frames] and `labels` [tokens] (and `attention_mask` [frames], by
                default all ones), or with audio and text. A batch may mix both kinds. A leading
                `<|startoftranscript|>` of labels is removed, as the model prepends it. `prompt_ids` [tokens], the text
                before the audio, go before it and have no loss.

        Returns:
            `dict`: `input_features` float32 [batch, mels, frames]; `attention_mask` int64 [batch, frames], 1 for audio
            and 0 for padding, which does not count in the gate budget (Whisper itself ignores the mask); `labels`
            int64 [batch, tokens], padded with -100. If examples or the collator have a language: `language`, a list of
            tags. For a teacher: `teacher_input_features` float32 [batch, teacher's mels, frames], if they differ;
            `teacher_labels` int64 [batch, tokens], the labels in its vocabulary (-100 for tokens that it lacks), if
            that differs. If examples have `teacher_states`, its decoder states at each label: float16 [batch, tokens,
            hidden], padded with zeros, instead of its features.

        Raises:
            ValueError: labels longer than `max_label_length`; audio that is empty, unreadable or longer than the
                context; a raw example without audio, text or language; a column that only some examples have;
                prepared examples without the features that the teacher needs; `teacher_states` that do not match the
                number of `labels`.
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
        prompts = [torch.as_tensor(example.get("prompt_ids", ()), dtype=torch.long) for example in examples]
        decoder_input_ids = None
        if any(map(len, prompts)):
            decoder_input_ids = self._decoder_inputs(prompts, labels)
            labels = [
                torch.cat([torch.full_like(prompt, -100), tokens])
                for prompt, tokens in zip(prompts, labels, strict=True)
            ]
        batch: dict[str, torch.Tensor | list[str]] = {
            "input_features": torch.stack(input_features),
            "attention_mask": torch.stack(attention_mask),
            "labels": _pad_labels(labels),
        }
        if decoder_input_ids is not None:
            batch["decoder_input_ids"] = decoder_input_ids
        languages: list[Any] = [example.get(self.language_column) or self.language for example in features]
        if any(languages):
            _check_complete("language", languages, "fill the column or give the collator language=... (such as 'ca')")
            batch["language"] = [language_tag(language) for language in languages]
        return {**batch, **self._teacher_batch(examples, labels)}

    def _decoder_inputs(self, prompts: list[torch.Tensor], labels: list[torch.Tensor]) -> torch.Tensor:
        """int64 [batch, tokens]: prompt, `<|startoftranscript|>`, and all labels but the last."""
        start, padding = torch.tensor([self._start_id]), self.processor.tokenizer.pad_token_id
        inputs = [torch.cat([prompt, start, tokens[:-1]]) for prompt, tokens in zip(prompts, labels, strict=True)]
        longest = max(map(len, inputs))
        if longest > self.max_label_length:
            raise ValueError(
                f"a prompt and its labels have {longest} tokens together, more than the decoder's limit of "
                f"{self.max_label_length}: shorten prompt_ids"
            )
        return pad_sequence(inputs, batch_first=True, padding_value=padding)

    def _labels(self, example: dict[str, Any]) -> torch.Tensor:
        if "labels" not in example:
            raise ValueError(f"an example with 'input_features' has no 'labels'; it has {sorted(example)}")
        labels = torch.as_tensor(example["labels"], dtype=torch.long)
        if len(labels) and labels[0] == self._start_id:
            labels = labels[1:]
        if len(labels) > self.max_label_length:
            raise ValueError(
                f"labels of {len(labels)} tokens are longer than the decoder's limit of {self.max_label_length}: drop "
                "such examples (prepare_dataset does, and counts them) or split their audio and text"
            )
        return labels

    def _teacher_batch(self, examples: list[dict[str, Any]], labels: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The part of a batch for the teacher, from examples and their labels [tokens]."""
        batch: dict[str, torch.Tensor] = {}
        columns = self._teacher_columns
        cells = [example.get(STATES_COLUMN) for example in examples]
        features = [example.get("teacher_input_features") for example in examples]
        needs_features = columns is not None and columns.extractor is not None
        if any(cell is not None for cell in cells):
            _check_complete(STATES_COLUMN, cells, "cache the teacher's states of the whole dataset")
            states = [_states(cell, tokens) for cell, tokens in zip(cells, labels, strict=True)]
            batch[STATES_COLUMN] = pad_sequence(states, batch_first=True)
        elif needs_features or any(feature is not None for feature in features):
            _check_complete(
                "teacher_input_features", features, "prepare it with prepare_dataset(teacher_processor=...)"
            )
            batch["teacher_input_features"] = torch.stack(
                [torch.as_tensor(feature, dtype=torch.float32) for feature in features]
            )
        if columns is not None and columns.vocabulary is not None:
            batch["teacher_labels"] = columns.vocabulary.teacher_labels(_pad_labels(labels))
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
        samples = read_row(example, self.audio_column, extractor.sampling_rate)
        if len(samples) > extractor.n_samples:
            # The extractor would cut it silently, and the transcript would be of more than the model hears.
            seconds = len(samples) / extractor.sampling_rate
            raise ValueError(
                f"audio {audio_name(example[self.audio_column])} lasts {seconds:.1f} s, longer "
                f"than the context of {context_seconds(extractor):g} s: use prepare_dataset with "
                "long_audio='drop' or 'cut'"
            )
        prompt = prompt_code(language, self.prompt_language)
        labels = encode_labels(self.processor.tokenizer, example[self.text_column], prompt, self.task)
        return example_features(samples, labels, self.processor, self._teacher_columns)


def _check_complete(column: str, values: list[Any], remedy: str) -> None:
    """Raises a `ValueError` that names the first example without a value."""
    for index, value in enumerate(values):
        if value is None:
            raise ValueError(f"example {index} of the batch has no {column!r}: {remedy}")


def _states(cell: Any, labels: torch.Tensor) -> torch.Tensor:
    """The teacher's states [tokens, hidden] of one example at its labels [tokens]; zeros where those are -100."""
    is_label = labels != -100
    shape, num_tokens = tuple(torch.as_tensor(cell).shape), int(is_label.sum())
    if shape[0] != num_tokens if len(shape) == 2 else shape[0] % num_tokens:
        raise ValueError(
            f"'teacher_states' of shape {shape} are not one state for each of {num_tokens} labels: the labels changed "
            "after the teacher's states were cached; cache them again"
        )
    states = unflatten_states(cell, num_tokens)
    at_labels = states.new_zeros(len(labels), states.shape[1])
    at_labels[is_label] = states
    return at_labels


def _pad_labels(labels: list[torch.Tensor]) -> torch.Tensor:
    return pad_sequence(labels, batch_first=True, padding_value=-100)
