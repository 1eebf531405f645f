"""OpenAI's interface: reads requests, and has them transcribed."""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated, Any

import fastapi
from fastapi.exceptions import RequestValidationError
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..data.audio import audio_seconds
from ..inference.subtitles import Transcript
from .catalog import Catalog
from .errors import ApiError, busy, too_long, unreadable
from .form import Form, form_error
from .formats import make_response
from .gate import Gate
from .settings import Settings

logger = logging.getLogger("ray.serve")  # whose messages Ray shows and keeps
APPLICATION = "peft_clsr"
# A replica that dies fails all requests of its batch. Each is sent to another one, but a recording that kills replicas
# must not kill them all.
_ATTEMPTS = 3


class Api:
    """
    Answers requests.

    Args:
        settings ([`Settings`]): The service's.
        catalog ([`Catalog`]): Its languages.
        transcribers (`DeploymentHandle`): The replicas of [`Transcriber`].
    """

    def __init__(self, settings: Settings, catalog: Catalog, transcribers: DeploymentHandle) -> None:
        self.settings, self.catalog, self.transcribers = settings, catalog, transcribers

    async def health(self) -> Response:
        """200 if a recording can be transcribed now, else 503."""
        status = await asyncio.to_thread(serve.status)
        replicas: dict[Any, int] = dict(status.applications[APPLICATION].deployments["Transcriber"].replica_states)
        running = replicas.get("RUNNING", 0)
        content = {"status": "ok" if running else "no replica is running", "replicas": replicas}
        return JSONResponse(content, 200 if running else 503)

    def models(self) -> dict[str, Any]:
        """The list with the one model."""
        return {"object": "list", "data": [self._model()]}

    def model(self, name: str) -> dict[str, Any]:
        """The model of a name. Raises an `ApiError` for another one."""
        self._check_model(name)
        return self._model()

    def _model(self) -> dict[str, Any]:
        experts = sorted(expert.code for _, expert in self.catalog.experts)
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self.settings.created,
            "owned_by": "peft_clsr",
            "languages": sorted(self.catalog.languages or {*self.catalog.known, *experts}),
            "experts": experts,
        }

    async def answer(self, form: Form, task: str) -> Response:
        """
        Transcribe or translate a recording.

        Args:
            form ([`Form`]): The request.
            task (`str`): "transcribe" or "translate".

        Raises:
            ApiError: for a bad request, or if there is no room.
        """
        self._check_model(form.model)
        try:
            language = self.catalog.find(form.language or None)
        except ValueError as error:
            raise ApiError(400, str(error), "language", "invalid_language") from error
        if form.timestamp_granularities and form.response_format != "verbose_json":
            message = f"timestamp_granularities need the response_format 'verbose_json', not {form.response_format!r}"
            raise ApiError(400, message, "timestamp_granularities[]", "invalid_field")
        audio, name = await form.file.read(), form.file.filename or "file"
        # Before the request waits: a file that cannot be read, or is too long, is known from its header.
        try:
            seconds = await asyncio.to_thread(audio_seconds, {"bytes": audio, "path": name})
        except ValueError as error:
            raise unreadable(error) from error
        if seconds > self.settings.max_seconds:
            raise too_long(name, self.settings.max_seconds)
        transcript = await self._transcribe(audio, name, language, task, form.prompt, form.temperature)
        return make_response(transcript, form.response_format, task)

    async def _transcribe(self, *arguments: Any) -> Transcript:
        """Call a replica. One that dies is replaced by another, as Ray sends no request a second time by itself."""
        for _ in range(_ATTEMPTS):
            try:
                result = await self.transcribers.transcribe.remote(*arguments)
            except (ActorDiedError, ActorUnavailableError):
                logger.warning("a replica died, and its request goes to another one")
                continue
            except BackPressureError as error:
                waiting = self.settings.max_queue
                raise busy(f"{waiting} requests wait already, the limit of this service: try again later") from error
            except DeploymentUnavailableError as error:
                raise busy("no replica can be started: the logs of the service say why") from error
            if isinstance(result, ApiError):
                raise result
            return result
        raise busy(f"{_ATTEMPTS} replicas died while they transcribed this recording or others beside it")

    def _check_model(self, name: str) -> None:
        if name != self.settings.name:
            message = f"the model {name!r} does not exist: this service has {self.settings.name!r}"
            raise ApiError(404, message, "model", "model_not_found")


def make_application(api: Api) -> fastapi.FastAPI:
    """The addresses of a service, and its errors."""
    settings = api.settings
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, key_hash=settings.key_hash, max_bytes=settings.max_bytes)

    app.get("/health")(api.health)
    app.get("/v1/models")(api.models)
    app.get("/v1/models/{name:path}")(api.model)

    @app.post("/v1/audio/transcriptions")
    async def transcriptions(form: Annotated[Form, fastapi.Form(media_type="multipart/form-data")]) -> Response:
        return await api.answer(form, "transcribe")

    @app.post("/v1/audio/translations")
    async def translations(form: Annotated[Form, fastapi.Form(media_type="multipart/form-data")]) -> Response:
        return await api.answer(form, "translate")

    @app.exception_handler(RequestValidationError)
    async def bad_form(request: Request, error: RequestValidationError) -> Response:
        return form_error(error).response()

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, ApiError):  # of FastAPI: no such address, or a form that cannot be read
            error = ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}")
        return error.response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return ApiError(500, "the service failed; its logs say why", code="internal_error").response()

    return app
