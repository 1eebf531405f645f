"""A `PeftModel` around a model whose adapters were added by transformers' own `add_adapter`."""

from __future__ import annotations

import warnings
from contextvars import ContextVar
from typing import Any

from peft import PeftConfig, PeftModel

from .layer import CLSRLayer

# True while `as_peft_model` runs, in which nothing is put into the model.
is_wrapping: ContextVar[bool] = ContextVar("peft_clsr_is_wrapping", default=False)


def as_peft_model(model: Any) -> PeftModel:
    """
    A `PeftModel` around a model that has CLSR adapters already. It shares their weights.

    Args:
        model (`nn.Module`): A [`~peft.PeftModel`], which is returned as it is, or a model of transformers whose
            adapters were added by its own `add_adapter` or `load_adapter`.

    Raises:
        ValueError: the model has no CLSR adapter.
    """
    if hasattr(getattr(model, "base_model", None), "budget_loss"):
        return model
    layer = next((module for module in model.modules() if isinstance(module, CLSRLayer)), None)
    if layer is None or not hasattr(model, "peft_config"):
        raise ValueError(
            f"the model is a {type(model).__name__} without a CLSR adapter: wrap it with "
            "get_peft_model(model, CLSRConfig(...)) first"
        )
    configs: dict[str, PeftConfig] = model.peft_config
    active = next(iter(layer.active_adapters), next(iter(configs)))
    token = is_wrapping.set(True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            wrapped = PeftModel(model, configs[active], adapter_name=active)
    finally:
        is_wrapping.reset(token)
    tuner: Any = wrapped.base_model
    for name in configs:
        tuner._cast_adapter_dtype(name)  # half-precision weights become float32, as in get_peft_model
    return wrapped
