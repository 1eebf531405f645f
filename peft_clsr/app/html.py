"""Transcripts and waveforms as HTML. All text is escaped."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from difflib import SequenceMatcher
from html import escape

import numpy as np

from ..evaluation.normalization import leading_rate, normalize_text
from .gates import Word

CSS = """
.clsr-text { font-size: 1.1em; line-height: 1.9; overflow-wrap: anywhere; }
.clsr-text mark { color: inherit; background: none; border-bottom: 3px solid #d97706; }
.clsr-text span { border-radius: 3px; }
.clsr-wave { width: 100%; height: 90px; display: block; }
"""
_OPEN = "5, 150, 105"  # green, legible on light and dark
_BARS = 240


def plain_words(text: str, language: str) -> list[Word]:
    """The words of a text, or its characters in languages without spaces between words, without gates."""
    if leading_rate(language) == "cer":
        return [Word(character) for character in text]
    return [Word(f" {word}") for word in text.split()]


def differences(words: Sequence[Word], others: Sequence[Word], language: str) -> tuple[list[bool], list[bool]]:
    """
    Find the words of two transcripts that differ. Case and punctuation do not count, as in [`error_rates`].

    Returns:
        `tuple`: for each word of the first and of the second, True if the other has another word there or none.
    """
    first, second = ([normalize_text(word.text, language) for word in side] for side in (words, others))
    different = [[bool(text) for text in side] for side in (first, second)]
    for block in SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks():
        for flags, start in zip(different, (block.a, block.b), strict=True):
            flags[start : start + block.size] = [False] * block.size
    return different[0], different[1]


def text_html(words: Sequence[Word], different: Sequence[bool]) -> str:
    """A transcript. Words that differ are underlined. Words are the greener the more of their gates are open."""
    parts = []
    for word, is_different in zip(words, different, strict=True):
        text = escape(word.text)
        if is_different:
            space = text[: len(text) - len(text.lstrip())]
            text = f"{space}<mark>{text.lstrip()}</mark>"
        if word.gate is not None:
            text = (
                f'<span style="background: rgba({_OPEN}, {0.5 * word.gate:.2f})" title="{word.gate:.0%}">{text}</span>'
            )
        parts.append(text)
    return f'<div class="clsr-text" dir="auto">{"".join(parts) or "<i>nothing heard</i>"}</div>'


def waveform_html(waveform: np.ndarray, positions: np.ndarray | None = None) -> str:
    """
    A waveform as bars: green where the encoder's gates are open, else grey.

    Args:
        waveform (`np.ndarray`): float32 [samples].
        positions (`np.ndarray`, *optional*): [positions of 20 ms], in [0, 1]. The recording's whole length.
    """
    count = max(1, min(_BARS, len(waveform) // 160))
    heights = np.array([np.abs(part).max() for part in np.array_split(waveform, count)])
    heights = 100 * heights / max(float(heights.max()), 1e-6)
    gates = np.zeros(count)
    if positions is not None and len(positions):
        edges = np.linspace(0, len(positions), count + 1).astype(int)
        gates = np.array(
            [
                positions[min(a, len(positions) - 1) : max(b, a + 1)].mean()
                for a, b in zip(edges, edges[1:], strict=False)
            ]
        )
    bars = "".join(
        f'<rect x="{index}" y="{50 - height / 2:.1f}" width="0.8" height="{max(height, 1):.1f}" '
        f'fill="rgb({_blend(gate)})"/>'
        for index, (height, gate) in enumerate(zip(heights, gates, strict=True))
    )
    return f'<svg class="clsr-wave" viewBox="0 0 {count} 100" preserveAspectRatio="none">{bars}</svg>'


def download_html(name: str, content: str) -> str:
    """A link that saves a text as a file. The text is in the link, so the server keeps no file."""
    data, name = b64encode(content.encode()).decode(), escape(name)
    return f'<a href="data:application/x-subrip;base64,{data}" download="{name}">Save the subtitles ({name})</a>'


def _blend(gate: float) -> str:
    """Grey to green."""
    green = [int(part) for part in _OPEN.split(",")]
    return ", ".join(str(round(156 + gate * (part - 156))) for part in green)
