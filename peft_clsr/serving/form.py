"""The fields of a request."""

from __future__ import annotations

from typing import Literal

from fastapi import UploadFile
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field

from .errors import ApiError


class Form(BaseModel):
    """
    A recording, and how to transcribe it, as OpenAI names the fields.

    A field that is not here is refused: what a client asks for and does not get is said.
    """

    model_config = ConfigDict(extra="forbid")

    file: UploadFile
    model: str
    language: str | None = None
    prompt: str = ""
    temperature: float = Field(0.0, ge=0.0, le=1.0)
    response_format: Literal["json", "text", "srt", "vtt", "verbose_json"] = "json"
    timestamp_granularities: list[Literal["segment"]] = Field([], alias="timestamp_granularities[]")


def form_error(error: RequestValidationError) -> ApiError:
    """The error for fields that are missing, unknown or wrong. It names the first one."""
    first = error.errors()[0]
    field = str(first["loc"][1]) if len(first["loc"]) > 1 else "file"
    if first["type"] == "missing":
        message = f"the field {field!r} is missing"
    elif first["type"] == "extra_forbidden":
        known = [info.alias or name for name, info in Form.model_fields.items()]
        message = f"the field {field!r} is not supported here: expected {', '.join(known)}"
    else:
        message = f"{field} is {first['input']!r}: {first['msg']}"
    return ApiError(400, message, field, "invalid_field")
