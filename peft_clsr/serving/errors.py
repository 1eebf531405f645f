"""Errors as OpenAI's interface gives them."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse


class ApiError(HTTPException):
    """
    A request that is not answered.

    It is an `HTTPException`, as FastAPI passes only these on while it reads a form.

    Args:
        status (`int`): The HTTP status.
        message (`str`): For the user of the client.
        param (`str`, *optional*): The field that is wrong.
        code (`str`, *optional*): A word for programs.
        retry_after (`int`, *optional*): Seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(status, message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return ApiError, (self.status, self.message, self.param, self.code, self.retry_after)

    def response(self) -> JSONResponse:
        """The answer with this error."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return JSONResponse({"error": error}, self.status, headers)


def busy(message: str) -> ApiError:
    """The error of a service that has no room now. OpenAI's clients try again by themselves."""
    return ApiError(503, message, code="overloaded", retry_after=1)


def unreadable(error: ValueError) -> ApiError:
    """The error for a file that cannot be read, from that of [`read_audio`]."""
    return ApiError(400, str(error), "file", "invalid_file")


def too_long(name: str, limit: float) -> ApiError:
    """The error for a recording of more than `limit` seconds."""
    message = f"audio {name} is longer than the limit of this service, {limit:g} s: cut it into parts"
    return ApiError(400, message, "file", "audio_too_long")
