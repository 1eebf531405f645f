"""Whisper's rules for the next token, in NumPy: those of openai/whisper's decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenRules:
    """
    Tokens that a prediction may not have.

    Args:
        end (`int`): The token `<|endoftext|>`. Text tokens come before it.
        no_timestamps (`int`): The token `<|notimestamps|>`. Timestamps come after it.
        suppressed (`Sequence[int]`): Tokens that never come.
        blank (`Sequence[int]`): Tokens that do not come first.
        timestamps (`bool`): The prediction has timestamps.
        max_first (`int`): The latest first timestamp, in steps of 0.02 s.
    """

    end: int
    no_timestamps: int
    suppressed: Sequence[int]
    blank: Sequence[int]
    timestamps: bool
    max_first: int

    def apply(self, logits: np.ndarray, tokens: Sequence[int]) -> None:
        """
        Set the logits of forbidden tokens to minus infinity.

        Args:
            logits (`np.ndarray`): float [vocabulary], for the next token. It is changed.
            tokens (`Sequence[int]`): What was predicted so far.
        """
        logits[list(self.suppressed)] = -np.inf
        if not tokens:
            logits[list(self.blank)] = -np.inf
        if not self.timestamps:
            return
        first = self.no_timestamps + 1
        logits[self.no_timestamps] = -np.inf
        if not tokens:  # a segment starts with its time
            logits[:first] = -np.inf
            logits[first + self.max_first + 1 :] = -np.inf
            return
        is_time = tokens[-1] >= first
        if is_time and (len(tokens) == 1 or tokens[-2] >= first):
            logits[first:] = -np.inf  # a segment began: text follows
        elif is_time:
            logits[: self.end] = -np.inf  # a segment ended: another one begins, or the end
        last = max((token for token in tokens if token >= first), default=first)
        # Times do not go back, and a segment is not empty.
        logits[first : last + (0 if is_time and len(tokens) > 1 and tokens[-2] < first else 1)] = -np.inf
        # If it is likelier that a time comes than any one token of text, a time comes.
        times = logits[first:]
        top = times.max()
        if np.isfinite(top) and top + np.log(np.exp(times - top).sum()) > logits[:first].max():
            logits[:first] = -np.inf
