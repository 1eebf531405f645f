"""Adds CLSR to PEFT's `PeftType`."""

from __future__ import annotations

from peft import PeftType


def add_peft_type() -> None:
    """Add the member `CLSR` to `PeftType`. Python's enums cannot be extended, so this writes into their tables."""
    if "CLSR" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "CLSR")
    member._name_, member._value_ = "CLSR", "CLSR"
    PeftType._member_map_["CLSR"] = member
    PeftType._value2member_map_["CLSR"] = member
    PeftType._member_names_.append("CLSR")
    type.__setattr__(PeftType, "CLSR", member)


add_peft_type()  # on import, because CLSRConfig sets `peft_type` to the member
