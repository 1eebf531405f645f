"""Word and character error rates by language."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction
from transformers.models.whisper.english_normalizer import BasicTextNormalizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from ..extras import require


def error_rates(
    predictions: Sequence[str],
    references: Sequence[str],
    languages: Sequence[str] | None = None,
    language: str = "all",
) -> dict[str, dict[str, float | int]]:
    """
    Compute word and character error rates by language, over all utterances of a language together.

    Both sides are normalized by transformers' `BasicTextNormalizer`: lower case, no punctuation or symbols, nothing in
    brackets. Diacritics stay, as they distinguish words. English gets the same normalizer: its own needs a spelling
    table and would make languages incomparable.

    Args:
        predictions (`Sequence[str]`): Hypotheses.
        references (`Sequence[str]`): Correct transcripts, in the same order.
        languages (`Sequence[str]`, *optional*): Language of each utterance.
        language (`str`, *optional*, defaults to `"all"`): The key of the result without `languages`.

    Returns:
        `dict`: language to `{"wer", "cer", "utterances", "skipped"}`. Rates are fractions, 0.25 for 25 %, and may be
        above 1. `skipped` counts references that normalize to nothing (such as "♪"), `utterances` the scored ones. If
        no utterance is scored, the rates are NaN.

    Raises:
        ValueError: the lengths differ.

    Example:

    ```py
    >>> error_rates(["el gat negre"], ["El gat, blanc."], language="ca")["ca"]["wer"]
    0.3333333333333333
    ```
    """
    jiwer = require("jiwer")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references: give one each")
    if languages is None:
        languages = [language] * len(references)
    elif len(languages) != len(references):
        raise ValueError(f"{len(languages)} languages for {len(references)} references: give one each")

    normalize = BasicTextNormalizer(remove_diacritics=False)
    pairs: dict[str, list[tuple[str, str]]] = {key: [] for key in languages} or {language: []}
    for prediction, reference, key in zip(predictions, references, languages, strict=True):
        pairs[key].append((normalize(reference).strip(), normalize(prediction).strip()))
    rates: dict[str, dict[str, float | int]] = {}
    for key, utterances in pairs.items():
        scored = [pair for pair in utterances if pair[0]]
        wer = cer = math.nan
        if scored:
            reference_texts, predicted_texts = (list(side) for side in zip(*scored, strict=True))
            wer = float(jiwer.wer(reference_texts, predicted_texts))
            cer = float(jiwer.cer(reference_texts, predicted_texts))
        rates[key] = {
            "wer": wer,
            "cer": cer,
            "utterances": len(scored),
            "skipped": len(utterances) - len(scored),
        }
    return rates


def make_compute_metrics(processor: Any) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    Make the function of error rates for `Seq2SeqTrainer` and `DistillationTrainer` with `predict_with_generate=True`.

    Args:
        processor (`WhisperProcessor`): Decodes predictions and labels.

    Returns:
        `Callable`: takes an `EvalPrediction` with `predictions` and `label_ids` [utterances, tokens], -100 for
        padding. It returns "wer" and "cer", the means over languages, and "wer_ca", "cer_ca" for each language, all
        fractions as in [`error_rates`]. The language token in the labels of an utterance gives its language. Languages
        whose references all normalize to nothing are left out. It raises a `ValueError` if no language is left, if
        labels have no language token, or if predictions are logits.

    Example:

    ```py
    >>> args = DistillationTrainingArguments(
    ...     output_dir="runs/ca",
    ...     predict_with_generate=True,
    ...     eval_strategy="epoch",
    ...     save_strategy="epoch",
    ...     load_best_model_at_end=True,
    ...     metric_for_best_model="wer",
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
    tokenizer = processor.tokenizer
    language_ids = {tokenizer.convert_tokens_to_ids(f"<|{code}|>"): code for code in LANGUAGES}
    language_ids.pop(tokenizer.unk_token_id, None)  # of languages that the tokenizer does not know
    language_ids.pop(None, None)

    def decode(tokens: np.ndarray) -> list[str]:
        return tokenizer.batch_decode(np.where(tokens < 0, tokenizer.eos_token_id, tokens), skip_special_tokens=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        predictions: Any = prediction.predictions
        labels: Any = prediction.label_ids
        if isinstance(predictions, tuple) or predictions.ndim != 2:
            raise ValueError(
                "the predictions are outputs of the model, expected token ids [utterances, tokens]: set "
                "predict_with_generate=True"
            )
        languages = []
        for utterance, tokens in enumerate(labels):
            code = next((language_ids[token] for token in tokens.tolist() if token in language_ids), None)
            if code is None:
                raise ValueError(
                    f"the labels of utterance {utterance} have no language token: make them with encode_labels "
                    "(prepare_dataset and the collator do)"
                )
            languages.append(code)
        rates = error_rates(decode(predictions), decode(labels), languages)
        scored = {code: row for code, row in rates.items() if row["utterances"]}
        if not scored:
            raise ValueError(
                f"none of the {len(labels)} references can be scored: all normalize to nothing (such as '♪')"
            )
        metrics = {}
        for name in ("wer", "cer"):
            metrics[name] = sum(row[name] for row in scored.values()) / len(scored)
            metrics |= {f"{name}_{code}": row[name] for code, row in scored.items()}
        return metrics

    return compute_metrics
