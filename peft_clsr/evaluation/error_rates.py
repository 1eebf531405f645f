"""Word and character error rates by language."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from ..extras import require
from .normalization import normalize_text, rate_to_read

logger = logging.getLogger(__name__)


def error_rates(
    predictions: Sequence[str],
    references: Sequence[str],
    languages: Sequence[str] | None = None,
    language: str = "all",
) -> dict[str, dict[str, Any]]:
    """
    Compute word and character error rates by language, over all utterances of a language together.

    Both sides are normalized by [`normalize_text`]: no case, punctuation or brackets; marks and apostrophes stay in
    their words. Chinese, Cantonese, Japanese, Thai, Lao, Burmese, Khmer and Tibetan put no spaces between words, so
    spaces do not count there, an utterance is one word, and the CER is the rate to read.

    A reference that normalizes to nothing, such as "♪", is skipped, counted, and named in a warning.

    Args:
        predictions (`Sequence[str]`): Hypotheses.
        references (`Sequence[str]`): Correct transcripts, in the same order.
        languages (`Sequence[str]`, *optional*): Language of each utterance.
        language (`str`, *optional*, defaults to `"all"`): The language of all utterances, and the key of the result,
            without `languages`.

    Returns:
        `dict`: language to `{"wer", "cer", "rate", "utterances", "skipped"}`. Rates are fractions, 0.25 for 25 %, and
        may be above 1. `rate` is the one to read, "wer" or "cer". `utterances` counts the scored references, `skipped`
        the others. If no utterance is scored, the rates are NaN.

    Raises:
        ValueError: the lengths differ, or a prediction or reference is no text (`None`, NaN): its row is named.

    Example:

    ```py
    >>> error_rates(["el gat negre"], ["El gat, blanc."], language="ca")["ca"]["wer"]
    0.3333333333333333
    ```
    """
    rates, skipped = _rates_and_skipped(predictions, references, languages, language)
    _warn_of_skipped(skipped, len(references))
    return rates


def check_references(references: Sequence[str], language: str) -> None:
    """
    Check that there is something to score, before the work.

    Raises:
        ValueError: a reference is no text, or all normalize to nothing.
    """
    _check_texts("reference", references)
    if not any(normalize_text(reference, language) for reference in references):
        first = f" (row 0 is {references[0]!r})" if len(references) else ""
        raise ValueError(
            f"none of the {len(references)} references in {language!r} can be scored: without punctuation, symbols "
            f"and brackets nothing is left{first}. Check the column of transcripts"
        )


def _rates_and_skipped(
    predictions: Sequence[str], references: Sequence[str], languages: Sequence[str] | None, language: str
) -> tuple[dict[str, dict[str, Any]], list[int]]:
    """The rates, and the rows of references that normalize to nothing."""
    jiwer = require("jiwer")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references: give one each")
    if languages is None:
        languages = [language] * len(references)
    elif len(languages) != len(references):
        raise ValueError(f"{len(languages)} languages for {len(references)} references: give one each")
    _check_texts("prediction", predictions)
    _check_texts("reference", references)

    pairs: dict[str, list[tuple[str, str]]] = {key: [] for key in languages} or {language: []}
    skipped = []
    for row, (prediction, reference, key) in enumerate(zip(predictions, references, languages, strict=True)):
        pairs[key].append((normalize_text(reference, key), normalize_text(prediction, key)))
        if not pairs[key][-1][0]:
            skipped.append(row)
    rates: dict[str, dict[str, Any]] = {}
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
            "rate": rate_to_read(key),
            "utterances": len(scored),
            "skipped": len(utterances) - len(scored),
        }
    return rates, skipped


def _check_texts(kind: str, texts: Sequence[str]) -> None:
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{kind} {row} is {text!r}, expected text: give its transcript, or leave the row out")


def _warn_of_skipped(rows: list[int], total: int) -> None:
    if rows:
        first = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        logger.warning(
            "%d of %d references are not scored, as nothing but punctuation, symbols or brackets is in them: rows %s",
            len(rows),
            total,
            first,
        )


def make_compute_metrics(processor: Any) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    Make the function of error rates for `Seq2SeqTrainer` and `DistillationTrainer` with `predict_with_generate=True`.

    Args:
        processor (`WhisperProcessor`): Decodes predictions and labels.

    Returns:
        `Callable`: takes an `EvalPrediction` with `predictions` and `label_ids` [utterances, tokens], -100 for
        padding. It returns "wer" and "cer", the means over languages, "error_rate", the mean of each language's rate
        to read, and "wer_ca", "cer_ca" for each language, all fractions as in [`error_rates`]. The language token in
        the labels of an utterance gives its language. Languages whose references all normalize to nothing are left
        out. It raises a `ValueError` if no language is left, if labels have no language token, or if predictions are
        logits.

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
    tokenizer = processor.tokenizer
    language_ids = {tokenizer.convert_tokens_to_ids(f"<|{code}|>"): code for code in LANGUAGES}
    language_ids.pop(tokenizer.unk_token_id, None)  # of languages that the tokenizer does not know
    language_ids.pop(None, None)

    warned: list[bool] = []

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
        rates, skipped = _rates_and_skipped(decode(predictions), decode(labels), languages, "")
        if not warned and skipped:  # once, and not at each evaluation
            _warn_of_skipped(skipped, len(labels))
            warned.append(True)
        scored = {code: row for code, row in rates.items() if row["utterances"]}
        if not scored:
            raise ValueError(
                f"none of the {len(labels)} references can be scored: all normalize to nothing (such as '♪')"
            )
        metrics = {"error_rate": sum(row[row["rate"]] for row in scored.values()) / len(scored)}
        for name in ("wer", "cer"):
            metrics[name] = sum(row[name] for row in scored.values()) / len(scored)
            metrics |= {f"{name}_{code}": row[name] for code, row in scored.items()}
        return metrics

    return compute_metrics
