"""Makes CLSR known to PEFT and transformers. `import peft_clsr` calls this."""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from .checkpoints.guards import register_guards
from .checkpoints.hotswap import register_hotswap
from .inference.generation import register_language_routing
from .tuner.config import CLSRConfig
from .tuner.model import CLSRModel


def register() -> None:
    """
    Register the PEFT method CLSR, its hot-swapping, the guards of its loaders, and `generate` by language; once.

    Raises:
        ImportError: PEFT has a method CLSR of its own.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType.CLSR)
    if registered is None:
        register_peft_method(name="clsr", config_cls=CLSRConfig, model_cls=CLSRModel)
        register_hotswap()
        register_guards()
        register_language_routing()
    elif registered.__module__ != CLSRConfig.__module__:
        raise ImportError(
            f"this version of PEFT has a method CLSR of its own ({registered.__module__}.{registered.__name__}): use "
            "it instead of peft_clsr, or install an older peft"
        )
