"""Error rates for transformers' trainers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from ..languages.tags import language_tag
from .error_rates import error_rates
from .normalization import normalize_text


def make_compute_metrics(processor: Any, languages: Sequence[str] | None = None) -> ErrorRateMetrics:
    """
    Make the function of error rates for `Seq2SeqTrainer` and `DistillationTrainer` with `predict_with_generate=True`.

    Args:
        processor (`WhisperProcessor`): Decodes predictions and labels.
        languages (`Sequence[str]`, *optional*):
            Language of each utterance of the evaluation dataset, in its order, as in [`language_tag`]. By default
            `DistillationTrainer` takes those of the adapters that hear them. Elsewhere the language token in the
            labels counts, which several languages may share ("ca" and "ca-valencia").

    Returns:
        [`ErrorRateMetrics`]: a function for `compute_metrics`.

    Example:

    ```py
    >>> args = DistillationTrainingArguments(
    ...     output_dir="runs/ca",
    ...     predict_with_generate=True,
    ...     eval_strategy="epoch",
    ...     save_strategy="epoch",
    ...     load_best_model_at_end=True,
    ...     metric_for_best_model="error_rate",
    ...     greater_is_better=False,
    ... )
    >>> trainer = DistillationTrainer(
    ...     model=model,
    ...     args=args,
    ...     train_dataset=train_set,
    ...     eval_dataset=eval_set,
    ...     data_collator=collator,
    ...     compute_metrics=make_compute_metrics(processor),
    ...     callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
    ... )
    ```
    """
    return ErrorRateMetrics(processor.tokenizer, languages)


class ErrorRateMetrics:
    """
    Error rates by language, see [`make_compute_metrics`].

    Args:
        tokenizer (`WhisperTokenizer`): Decodes predictions and labels.
        languages (`Sequence[str]`, *optional*): Language of each utterance.

    Attributes:
        adapter_languages (`Sequence[str]`, *optional*):
            Language of the adapter of each utterance, from a trainer that knows it. It counts if no `languages` are
            given.
    """

    def __init__(self, tokenizer: Any, languages: Sequence[str] | None = None) -> None:
        self.tokenizer = tokenizer
        self.languages = None if languages is None else [language_tag(language) for language in languages]
        self.adapter_languages: Sequence[str] | None = None
        self._codes = {tokenizer.convert_tokens_to_ids(f"<|{code}|>"): code for code in LANGUAGES}
        self._codes.pop(tokenizer.unk_token_id, None)  # of languages that the tokenizer does not know
        self._codes.pop(None, None)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """
        Args:
            prediction (`EvalPrediction`): `predictions` and `label_ids` [utterances, tokens], -100 for padding.

        Returns:
            `dict[str, float]`: fractions as in [`error_rates`]: "error_rate", the mean over languages of the rate to
            read in each (CER in languages without spaces between words, else WER); "wer" and "cer", their means over
            languages; and "wer_ca", "cer_ca" for each language. Languages whose references all normalize to nothing
            are left out, with a warning.

        Raises:
            ValueError: no language can be scored, labels have no language token, the number of languages is another
                one than that of utterances, or predictions are logits.
        """
        predictions: Any = prediction.predictions
        labels: Any = prediction.label_ids
        if isinstance(predictions, tuple) or predictions.ndim != 2:
            raise ValueError(
                "the predictions are outputs of the model, expected token ids [utterances, tokens]: set "
                "predict_with_generate=True"
            )
        languages = self._languages_of(labels)
        references = self._decode(labels)
        if not any(map(normalize_text, references, languages)):
            raise ValueError(
                f"none of the {len(labels)} references can be scored: all normalize to nothing (such as '♪')"
            )
        rates = error_rates(self._decode(predictions), references, languages)
        scored = {code: row for code, row in rates.items() if row["utterances"]}
        metrics = {"error_rate": sum(row[row["rate"]] for row in scored.values()) / len(scored)}
        for name in ("wer", "cer"):
            metrics[name] = sum(row[name] for row in scored.values()) / len(scored)
            metrics |= {f"{name}_{code}": row[name] for code, row in scored.items()}
        return metrics

    def _decode(self, tokens: np.ndarray) -> list[str]:
        tokens = np.where(tokens < 0, self.tokenizer.eos_token_id, tokens)
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def _languages_of(self, labels: Any) -> list[str]:
        given = self.languages or self.adapter_languages
        if given is not None:
            if len(given) != len(labels):
                raise ValueError(
                    f"{len(given)} languages for {len(labels)} utterances: make_compute_metrics takes those of the "
                    "evaluation dataset, one each"
                )
            return list(given)
        languages = []
        for utterance, tokens in enumerate(labels):
            code = next((self._codes[token] for token in tokens.tolist() if token in self._codes), None)
            if code is None:
                raise ValueError(
                    f"the labels of utterance {utterance} have no language token: make them with encode_labels "
                    "(prepare_dataset and the collator do)"
                )
            languages.append(code)
        return languages
