"""Conditional language-specific routing (CLSR) experts for Whisper, as a plugin of Hugging Face PEFT."""

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method


def _add_peft_type() -> None:
    """Add the member CLSR to PEFT's enum, which is closed: the next best thing to being in its source."""
    if "CLSR" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "CLSR")
    member._name_, member._value_ = "CLSR", "CLSR"
    PeftType._member_map_["CLSR"] = member
    PeftType._value2member_map_["CLSR"] = member
    PeftType._member_names_.append("CLSR")
    type.__setattr__(PeftType, "CLSR", member)


_add_peft_type()  # before the config, whose default is the member

from .config import CLSRConfig  # noqa: E402
from .generation import register_language_routing  # noqa: E402
from .hotswap import register_hotswap  # noqa: E402
from .layer import CLSRLayer  # noqa: E402
from .loading import register_safe_loading  # noqa: E402
from .model import CLSRModel  # noqa: E402

_registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType.CLSR)
if _registered is None:
    register_peft_method(name="clsr", config_cls=CLSRConfig, model_cls=CLSRModel)
    register_hotswap()
    register_safe_loading()
    register_language_routing()
elif _registered.__module__ != CLSRConfig.__module__:
    raise ImportError(
        f"this version of PEFT has a method CLSR of its own ({_registered.__module__}.{_registered.__name__}): use it "
        "instead of peft_clsr, or install an older peft"
    )

from .trainer import (  # noqa: E402
    DataCollatorSpeechSeq2SeqWithPadding,
    DistillationTrainer,
    DistillationTrainingArguments,
    GateScheduleCallback,
    LanguageBatchIterable,
    LanguageBatchSampler,
    TeacherStates,
    cache_teacher_states,
    load_teacher_states,
)

__version__ = "0.1.0"

__all__ = [
    "CLSRConfig",
    "CLSRLayer",
    "CLSRModel",
    "DataCollatorSpeechSeq2SeqWithPadding",
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "GateScheduleCallback",
    "LanguageBatchIterable",
    "LanguageBatchSampler",
    "TeacherStates",
    "cache_teacher_states",
    "load_teacher_states",
]
