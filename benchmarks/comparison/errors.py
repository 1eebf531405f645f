"""Errors of utterances, and the rates that they give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Columns of an evaluation's "utterances".
SUBSTITUTIONS, DELETIONS, INSERTIONS, WORDS, CHARACTER_ERRORS, CHARACTERS = range(6)
# Columns of errors, and the column that they are divided by.
RATES = {
    "wer": ((SUBSTITUTIONS, DELETIONS, INSERTIONS), WORDS),
    "substitutions": ((SUBSTITUTIONS,), WORDS),
    "deletions": ((DELETIONS,), WORDS),
    "insertions": ((INSERTIONS,), WORDS),
    "cer": ((CHARACTER_ERRORS,), CHARACTERS),
}


def evaluation_of(utterances: Sequence[Sequence[int]]) -> dict[str, Any]:
    """
    Pool the errors of utterances.

    Args:
        utterances (`Sequence[Sequence[int]]`): For each utterance [substitutions, deletions, insertions, words,
            character errors, characters].

    Returns:
        `dict`: "wer" and "cer", fractions, and "utterances", as given.
    """
    totals = [sum(column) for column in zip(*utterances, strict=True)]
    rates = {}
    for name in ("cer", "wer"):
        errors, units = RATES[name]
        rates[name] = sum(totals[column] for column in errors) / totals[units]
    return {"cer": rates["cer"], "utterances": utterances, "wer": rates["wer"]}
