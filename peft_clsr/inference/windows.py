"""
Segments of a long recording as soon as Whisper's `generate` has them.

`generate` returns the segments of all windows at its end. Its callback `monitor_progress` gets only numbers of frames.
So this module wraps `_retrieve_segment`, which divides the tokens of a finished window into segments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

Listener = Callable[[int, list[dict[str, Any]]], None]
_listener: ContextVar[Listener | None] = ContextVar("peft_clsr_window_listener", default=None)


@contextmanager
def each_window(listener: Listener) -> Iterator[None]:
    """
    Call `listener` after each window of the calls of `generate` in this block.

    Args:
        listener (`Callable`): Gets the recording's position in the batch, and the segments of the window.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def _with_listener(retrieve: Callable[..., Any]) -> Callable[..., Any]:
    """The function named above, which tells the listener of the running thread."""

    @functools.wraps(retrieve)
    def retrieve_and_tell(*args: Any, **kwargs: Any) -> Any:
        segments, offset = retrieve(*args, **kwargs)
        listener = _listener.get()
        if listener is not None:
            listener(int(kwargs["prev_idx"]), segments)
        return segments, offset

    return retrieve_and_tell


WhisperGenerationMixin._retrieve_segment = staticmethod(  # type: ignore[method-assign, assignment]
    _with_listener(WhisperGenerationMixin._retrieve_segment)
)
