"""Word and character error rates by language."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ..extras import require
from .normalization import leading_rate, normalize_text


def error_rates(
    predictions: Sequence[str],
    references: Sequence[str],
    languages: Sequence[str] | None = None,
    language: str = "all",
) -> dict[str, dict[str, Any]]:
    """
    Compute word and character error rates by language, over all utterances of a language together.

    Both sides are normalized by the rules of their language: case, punctuation, symbols, invisible characters and what
    stands in brackets do not count. Marks and diacritics do, as they distinguish words. An apostrophe inside a word
    does, too. English has no spelling table: it would make languages incomparable.

    Chinese, Cantonese, Japanese, Thai, Lao, Burmese, Khmer and Tibetan put no spaces between words. Spaces do not
    count there, so a whole utterance is one word: read "cer".

    Args:
        predictions (`Sequence[str]`): Hypotheses. "" if nothing was heard.
        references (`Sequence[str]`): Correct transcripts, in the same order.
        languages (`Sequence[str]`, *optional*):
            Language of each utterance, as in [`language_tag`].
        language (`str`, *optional*, defaults to `"all"`): The same for all, without `languages`.

    Returns:
        `dict`: language, as given, to `{"wer", "cer", "rate", "utterances", "skipped"}`. Rates are fractions, 0.25 for
        25 %, and may be above 1. `rate` says which of the two to read: "wer" or "cer". `skipped` counts references
        that normalize to nothing (such as "♪"), `utterances` the scored ones. If no utterance is scored, the rates are
        NaN, with a warning.

    Raises:
        ValueError: the lengths differ, or a text or language is missing: `None`, NaN, or no string.

    Example:

    ```py
    >>> error_rates(["el gat negre"], ["El gat, blanc."], language="ca")["ca"]["wer"]
    0.3333333333333333
    >>> rates = error_rates(["你好世间"], ["你好，世界"], language="zh")["zh"]
    >>> rates[rates["rate"]]
    0.25
    ```
    """
    jiwer = require("jiwer")
    predictions, references = list(predictions), list(references)  # rows of a Series or Column need not be positions
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references: give one each")
    if languages is None:
        languages = [language] * len(references)
    languages = list(languages)
    if len(languages) != len(references):
        raise ValueError(f"{len(languages)} languages for {len(references)} references: give one each")
    _check_strings(references, "reference", "leave the utterance out, or write down what is said")
    _check_strings(predictions, "prediction", 'give "" if nothing was heard')
    _check_strings(languages, "language", "name the language of each utterance")

    rows: dict[str, list[int]] = {key: [] for key in languages} or {language: []}
    for row, key in enumerate(languages):
        rows[key].append(row)
    rates: dict[str, dict[str, Any]] = {}
    for key, own in rows.items():
        pairs = [(normalize_text(references[row], key), normalize_text(predictions[row], key)) for row in own]
        scored = [pair for pair in pairs if pair[0]]
        wer = cer = math.nan
        if scored:
            reference_texts, predicted_texts = (list(side) for side in zip(*scored, strict=True))
            wer = float(jiwer.wer(reference_texts, predicted_texts))
            cer = float(jiwer.cer(reference_texts, predicted_texts))
        else:
            warnings.warn(f"{_nothing_to_score(references, key, own)}: its rates are NaN", stacklevel=2)
        rates[key] = {
            "wer": wer,
            "cer": cer,
            "rate": leading_rate(key),
            "utterances": len(scored),
            "skipped": len(pairs) - len(scored),
        }
    return rates


def check_scorable(references: Sequence[str | None], language: str) -> None:
    """
    Check that a test set can be measured.

    Raises:
        ValueError: no reference has words. The message names the rows.
    """
    if not any(isinstance(text, str) and normalize_text(text, language) for text in references):
        problem = _nothing_to_score(references, language, range(len(references)))
        raise ValueError(f"{problem}: correct the transcripts, or give another test set")


def format_rates(rates: Mapping[str, Any]) -> str:
    """A language's rates as "WER 12.3%, CER 4.5%". The rate to read comes first. Says what was skipped."""
    names = ("cer", "wer") if rates["rate"] == "cer" else ("wer", "cer")
    skipped = f"; transcripts without words, not scored: {rates['skipped']}" if rates["skipped"] else ""
    return ", ".join(f"{name.upper()} {rates[name]:.1%}" for name in names) + skipped


def _check_strings(texts: Sequence[Any], kind: str, remedy: str) -> None:
    """Raise a `ValueError` that names the rows of what is no string, such as NaN of pandas."""
    wrong = [row for row, text in enumerate(texts) if not isinstance(text, str)]
    if wrong:
        raise ValueError(f"the {kind} of {_rows(wrong)} is {texts[wrong[0]]!r}, expected a string: {remedy}")


def _nothing_to_score(references: Sequence[Any], language: str, rows: Sequence[int]) -> str:
    if not rows:
        return f"language {language!r} has no reference to score"
    return (
        f"none of the {len(rows)} references in {language!r} can be scored, all normalize to nothing, such as "
        f"{references[rows[0]]!r} ({_rows(rows)})"
    )


def _rows(rows: Sequence[int]) -> str:
    """Rows, counted from 0, for a message; at most five."""
    shown = ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
    return f"row{'s' if len(rows) > 1 else ''} {shown}"
