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
    _wrap()
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@functools.cache
def _wrap() -> None:
    """Wrap the function named above, once. The listener is that of the running thread."""
    retrieve = WhisperGenerationMixin._retrieve_segment

    @functools.wraps(retrieve)
    def retrieve_and_tell(*args: Any, prev_idx: int, **kwargs: Any) -> Any:
        segments, offset = retrieve(*args, prev_idx=prev_idx, **kwargs)
        listener = _listener.get()
        if listener is not None:
            listener(int(prev_idx), segments)
        return segments, offset

    WhisperGenerationMixin._retrieve_segment = staticmethod(retrieve_and_tell)
