"""Batches of speech and transcripts for Whisper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..languages import language_code
from .audio import audio_name, read_audio
from .data import MAX_LABEL_LENGTH, encode_labels


@dataclass
class DataCollatorSpeechSeq2SeqWithPadding:
    """
    Make a batch for Whisper, from prepared examples (`prepare_dataset`) or raw ones (audio and text).

    Args:
        processor (`WhisperProcessor`): Its feature extractor pads audio to its context; its tokenizer encodes text.
        language (`str`, *optional*):
            Name or code of the language of raw examples that have no `language_column`.
        task (`str`, *optional*, defaults to `"transcribe"`): "transcribe" or "translate", for raw examples.
        audio_column (`str`, *optional*, defaults to `"audio"`): Audio of raw examples, as `read_audio` takes it.
        text_column (`str`, *optional*, defaults to `"text"`): Transcript of raw examples.
        language_column (`str`, *optional*, defaults to `"language"`): Language of each raw example, where it is there.
        max_label_length (`int`, *optional*, defaults to 448): What the decoder allows, in tokens.

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

    def __post_init__(self):
        if self.language is not None:
            self.language = language_code(self.language)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            features (`list[dict]`):
                Examples with `input_features` [mels, frames] and `labels` [tokens] (and `attention_mask` [frames]; all
                ones without), or with audio and text. Both kinds may stand in one batch. Labels that begin with
                `<|startoftranscript|>` lose it, as the model prepends it.

        Returns:
            `dict[str, torch.Tensor]`: `input_features` float32 [batch, mels, frames]; `attention_mask` int64
            [batch, frames], 1 for audio and 0 for padding, which the tuner leaves out of the gate budget (Whisper
            itself ignores it); `labels` int64 [batch, tokens], padded with -100.

        Raises:
            ValueError: labels longer than `max_label_length`; audio that is empty, unreadable or longer than the
                context; a raw example without audio, text or language.
        """
        examples = [feature if "input_features" in feature else self._prepare(feature) for feature in features]
        input_features = [torch.as_tensor(example["input_features"], dtype=torch.float32) for example in examples]
        attention_mask = [
            torch.as_tensor(example["attention_mask"], dtype=torch.long)
            if "attention_mask" in example
            else torch.ones(inputs.shape[-1], dtype=torch.long)
            for example, inputs in zip(examples, input_features, strict=True)
        ]
        return {
            "input_features": torch.stack(input_features),
            "attention_mask": torch.stack(attention_mask),
            "labels": torch.nn.utils.rnn.pad_sequence(
                [self._labels(example) for example in examples], batch_first=True, padding_value=-100
            ),
        }

    def _labels(self, example: dict[str, Any]) -> torch.Tensor:
        if "labels" not in example:
            raise ValueError(f"an example with 'input_features' has no 'labels'; it has {sorted(example)}")
        labels = torch.as_tensor(example["labels"], dtype=torch.long)
        start = self.processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
        if len(labels) and labels[0] == start:
            labels = labels[1:]
        if len(labels) > self.max_label_length:
            raise ValueError(
                f"labels of {len(labels)} tokens are longer than the decoder's limit of {self.max_label_length}: drop "
                "such examples (prepare_dataset does, and counts them) or split their audio and text"
            )
        return labels

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
        return {
            "input_features": inputs["input_features"][0],
            "attention_mask": inputs["attention_mask"][0],
            "labels": encode_labels(self.processor.tokenizer, example[self.text_column], language, self.task),
        }
