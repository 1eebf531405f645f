"""Checks the API key and the size before the body of a request is read."""

from __future__ import annotations

import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

# The fields of a form besides the file, and its boundaries.
_FIELDS = 2**16


def hash_key(key: str) -> str:
    """SHA-256 of an API key, in hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


class Gate:
    """
    An ASGI middleware.

    Args:
        app (`ASGIApp`): The application.
        key_hash (`str`, *optional*): Of [`hash_key`]. Without it, everybody is served.
        max_bytes (`int`): Size of a file.
    """

    def __init__(self, app: ASGIApp, key_hash: str | None, max_bytes: int) -> None:
        self.app, self.key_hash, self.max_bytes = app, key_hash, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        read = 0

        async def receive_up_to_limit() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_bytes + _FIELDS:  # a body without a length, or with a wrong one
                raise self._too_large()
            return message

        try:
            self._check(headers)
        except ApiError as error:
            await error.response()(scope, receive, send)
        else:
            await self.app(scope, receive_up_to_limit, send)

    def _check(self, headers: Headers) -> None:
        if self.key_hash is not None:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(hash_key(key.strip()), self.key_hash):
                message = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
                raise ApiError(401, message, code="invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_bytes + _FIELDS:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        message = (
            f"the file is larger than the limit of this service, {self.max_bytes / 2**20:g} MiB: cut it into parts"
        )
        return ApiError(413, f"{message}, or send it compressed", "file", "file_too_large")
