"""The progress of training, which scales the noise on gate logits."""

from __future__ import annotations

from torch import nn

from .layer import CLSRLayer


def set_gate_progress(model: nn.Module, progress: float) -> None:
    """
    Set the progress of training, which scales the noise on gate logits; for a training loop of your own.

    The noise rises from 0 to `gate_noise`. For straight-through gates it falls from `gate_noise` to 0 in the first
    half of training. Without this call there is no noise. In a `Trainer`, [`GateScheduleCallback`] calls it.

    Args:
        model (`nn.Module`):
            A model with CLSR adapters: a [`~peft.PeftModel`], or a Whisper whose adapter was added by transformers'
            own `add_adapter`. It may be wrapped, as by DDP or `torch.compile`.
        progress (`float`): In [0, 1]; 0 at the start.

    Raises:
        TypeError: the model has no CLSR adapter.
        ValueError: `progress` is outside [0, 1].

    Example:

    ```py
    >>> for step, batch in enumerate(batches):
    ...     set_gate_progress(model, step / len(batches))
    ...     model(**batch).loss.backward()
    ```
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"gate progress is {progress}, expected in [0, 1]: give step / number of training steps")
    layer = next((module for module in model.modules() if isinstance(module, CLSRLayer)), None)
    if layer is None:
        raise TypeError(
            f"a {type(model).__name__} without a CLSR adapter has no gate noise to set: add one first, with "
            "get_peft_model(model, CLSRConfig(...)) or model.add_adapter(CLSRConfig(...))"
        )
    layer.route.routing.gate_progress = float(progress)
