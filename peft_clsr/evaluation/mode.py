"""Evaluation mode for the time of a block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

# Of each module in running blocks: its own mode, and the number of blocks. Several threads may share a model.
_modules: WeakKeyDictionary[nn.Module, tuple[bool, int]] = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Use evaluation mode in the block. After the last block on a model, each module gets its own mode back."""
    modules = list(model.modules())
    with _lock:
        for module in modules:
            mode, blocks = _modules.get(module, (module.training, 0))
            _modules[module] = mode, blocks + 1
        model.eval()
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                mode, blocks = _modules.pop(module)
                if blocks > 1:
                    _modules[module] = mode, blocks - 1
                else:
                    module.training = mode
