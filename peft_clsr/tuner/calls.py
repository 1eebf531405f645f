"""
State of running calls. Several threads, or tasks of asyncio, may call one model at the same time.

- `Calls`: what a call sets for itself, such as the adapter of each sample. A `ContextVar` holds it.
- `PerThread`: what the modules of one forward pass to each other.

torch.compile can trace neither a `ContextVar` nor a `threading.local`. Traced code reads plain attributes instead, so
calls of a compiled model that set something for themselves take turns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Generic, Protocol, TypeVar

import torch


class Call:
    """
    What a call of a model sets for itself. It is never changed; a call within replaces it.

    Args:
        adapter_names (`list[str]`, *optional*): Adapter of each sample. `None`: the active adapter.
        labels (`torch.Tensor`, *optional*): Labels of a batch whose forward gets none.
        recorded (`dict[str, torch.Tensor]`, *optional*): Filled with the gate values of each module.
        shared_decoder (`list[bool]`, *optional*):
            For each sample, True if its decoder takes the shared FFNs alone. `None`: for no sample.
    """

    def __init__(
        self,
        adapter_names: list[str] | None = None,
        labels: torch.Tensor | None = None,
        recorded: dict[str, torch.Tensor] | None = None,
        shared_decoder: list[bool] | None = None,
    ) -> None:
        self.adapter_names, self.labels, self.recorded = adapter_names, labels, recorded
        self.shared_decoder = shared_decoder

    def replace(self, **changes: Any) -> Call:
        return Call(**{**vars(self), **changes})


_NO_CALL = Call()
# The running call of each model. The mapping is replaced, never changed: contexts are copied, not what they hold.
_running: ContextVar[Mapping[Calls, Call]] = ContextVar("peft_clsr_running_calls", default={})  # noqa: B039


class Calls:
    """The running calls of one model."""

    def __init__(self) -> None:
        # Held while adapters are added or removed, and by each call of a compiled model.
        self.lock = threading.RLock()
        self.is_compiled = False
        self._latest = _NO_CALL  # of any thread

    def __reduce__(self) -> tuple:
        return Calls, ()  # a copy of the model runs no call

    def current(self, is_training: bool = False) -> Call:
        """
        The running call of this thread or task.

        Args:
            is_training (`bool`): True for a module in training mode. The backward pass recomputes checkpointed modules
                in a thread of its own, so there the latest call of any thread counts.
        """
        if torch.compiler.is_compiling():
            return self._latest
        return _running.get().get(self) or (self._latest if is_training else _NO_CALL)

    @contextmanager
    def enter(self, **changes: Any) -> Iterator[Call]:
        """Within this context, the running call is the current one with `changes`."""
        if torch.compiler.is_compiling():
            enclosing = self._latest
            self._latest = enclosing.replace(**changes)
            try:
                yield self._latest
            finally:
                self._latest = enclosing
            return
        with self.lock if self.is_compiled else nullcontext():
            outer = _running.get().get(self)
            call = (outer or _NO_CALL).replace(**changes)
            self._set(call)
            try:
                yield call
            finally:
                self._set(outer)

    def _set(self, call: Call | None) -> None:
        # No token to reset: the generator of a context may be closed in another context.
        others = {calls: other for calls, other in _running.get().items() if calls is not self}
        _running.set(others if call is None else {**others, self: call})
        self._latest = call or _NO_CALL


class _ForwardState(Protocol):
    @property
    def is_set(self) -> bool: ...

    def clear(self) -> None: ...


State = TypeVar("State", bound=_ForwardState)


class PerThread(Generic[State]):
    """
    A state of each thread, which one module of a forward starts, and others read.

    In a partly compiled model one of them may be compiled, and the other not. So the latest state is also a plain
    attribute, for compiled modules to read; and `traced` is the one that compiled modules started.

    Args:
        make (`Callable`): Makes an empty state. It has `is_set`, and `clear`, which empties it.
    """

    def __init__(self, make: Callable[[], State]) -> None:
        self._make, self._threads = make, threading.local()
        self._traced = self._latest = make()

    def __reduce__(self) -> tuple:
        return PerThread, (self._make,)  # tensors with a graph can be neither copied nor pickled

    def start(self) -> State:
        """An empty state, which `get` gives from now on."""
        if torch.compiler.is_compiling():
            self._latest = self._traced
            self._traced.clear()
            return self._traced
        self._threads.state = self._latest = state = self._make()
        return state

    def get(self) -> State:
        """The state that was started last in this thread."""
        if torch.compiler.is_compiling():
            return self._latest
        if self._latest is self._traced and self._traced.is_set:
            return self._traced
        state = getattr(self._threads, "state", None)
        return self.start() if state is None else state
