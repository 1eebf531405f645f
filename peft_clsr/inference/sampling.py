"""Sampling that does not depend on what other threads draw."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

# transformers draws from torch's global generators, so calls that sample take turns.
_lock = threading.Lock()
# States of the generators of the block `seeded_sampling`, by device.
_states: ContextVar[dict[torch.device, torch.Tensor] | None] = ContextVar("peft_clsr_sampling", default=None)


@contextmanager
def seeded_sampling() -> Iterator[None]:
    """Within this context, `generate` draws the same random numbers each time. Global generators do not change."""
    token = _states.set({})
    try:
        yield
    finally:
        _states.reset(token)


@contextmanager
def own_draws(device: torch.device) -> Iterator[None]:
    """Within this context, torch's generator of `device` is that of the running `seeded_sampling`, if there is one."""
    states = _states.get()
    if states is None:
        yield
        return
    module = torch if device.type == "cpu" else torch.get_device_module(device)
    which = (device,) if device.type not in ("cpu", "mps") else ()
    with _lock:
        outer = module.get_rng_state(*which)
        own = states.get(device)
        module.set_rng_state(torch.Generator(device).manual_seed(0).get_state() if own is None else own, *which)
        try:
            yield
        finally:
            states[device] = module.get_rng_state(*which)
            module.set_rng_state(outer, *which)
