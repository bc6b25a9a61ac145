"""What all routes have in common: errors in OpenAI's shape, bodies, and who calls."""

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, model_validator

from veratune.errors import (
    AdapterFileError,
    AdapterNotFoundError,
    JobNotFoundError,
    PoolFullError,
    QueueFullError,
    ShutdownError,
    StoreError,
    VeratuneError,
)
from veratune.serving.engine.loop import BaseRequest, Loop
from veratune.serving.keys import Caller
from veratune.serving.service import Service

log = logging.getLogger(__name__)


class ApiError(Exception):
    """An error in OpenAI's shape. status: of HTTP; kind: its type; code: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code = status, kind, code

    def response(self) -> JSONResponse:
        body = {
            "error": {"message": str(self), "type": self.kind, "param": None, "code": self.code}
        }
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        return JSONResponse(body, self.status, headers)


class Body(BaseModel):
    """A JSON body; what it does not know is refused, and null is as good as not given, as OpenAI's clients have it."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _given(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                "half of a surrogate pair is no text; valid Unicode is wanted"
            ) from None
        except RecursionError:
            raise ValueError("too many levels") from None
        return {key: value for key, value in data.items() if value is not None}


def get_caller(request: Request) -> Caller:
    """CallerDep a request's key belongs to. Raises ApiError."""
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    found: Caller | None = request.app.state.keys.caller(
        key.strip() if kind.lower() == "bearer" else None
    )
    if found is None:
        raise ApiError(
            401,
            "no key, or one that is not known; send it as Authorization: Bearer KEY",
            "authentication_error",
            "invalid_api_key",
        )
    request.state.tenant = found.tenant
    return found


def get_service(request: Request) -> Service:
    """The service behind the application."""
    service: Service = request.app.state.service
    return service


CallerDep = Annotated[Caller, Depends(get_caller)]
ServiceDep = Annotated[Service, Depends(get_service)]


def get_tenant(caller: CallerDep, tenant: str | None = None) -> str:
    """The tenant that a call is for. Raises AdapterNotFoundError for one that the key does not speak for."""
    if tenant is None or tenant in caller.tenants:
        return tenant or caller.tenant
    raise AdapterNotFoundError("no such adapter, or this key may not use it")


TenantDep = Annotated[str, Depends(get_tenant)]
Limit = Annotated[int, Query(ge=1, le=1000)]


def page(data: list[Any], more: bool, **others: Any) -> dict[str, Any]:
    """A list as OpenAI's clients read it."""
    return {"object": "list", "data": data, "has_more": more, **others}


async def submit_and_wait(loop: Loop[Any], request: BaseRequest) -> Any:
    """Submit a request that has one answer, and wait for it; a caller who stops waiting cancels it. Raises what went wrong."""
    running = asyncio.get_running_loop()
    answer: asyncio.Future[Any] = running.create_future()

    def put(value: Any) -> None:
        if not answer.done():
            answer.set_result(value)

    request.on_output = lambda value: post_threadsafe(running, put, value)
    loop.submit(request)
    try:
        value = await answer
    finally:
        if request.finished_time is None:
            loop.cancel(request)
    if isinstance(value, BaseException):
        raise value
    return value


def post_threadsafe(
    loop: asyncio.AbstractEventLoop, put: Callable[[Any], None], value: Any
) -> None:
    """Hand a value from an engine's thread to the server's."""
    with contextlib.suppress(RuntimeError):  # the loop has ended with its server
        loop.call_soon_threadsafe(put, value)


def to_api_error(error: BaseException) -> ApiError:
    """An error as a client sees it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, AdapterNotFoundError):
        return ApiError(404, str(error), code="model_not_found")
    if isinstance(error, JobNotFoundError):
        return ApiError(404, str(error), code="not_found")
    if isinstance(error, QueueFullError | PoolFullError):
        return ApiError(429, str(error), "rate_limit_error", "rate_limit_exceeded")
    if isinstance(error, StoreError):
        log.error("store: %s", error)
        return ApiError(503, "the store of adapters cannot be reached", "server_error")
    if isinstance(error, ShutdownError):
        return ApiError(503, str(error), "server_error")
    if isinstance(error, AdapterFileError):
        return ApiError(400, f"the adapter was refused: {error}", code="invalid_adapter")
    if isinstance(error, VeratuneError):
        return ApiError(400, str(error))
    log.error("unforeseen", exc_info=error)
    return ApiError(500, "something went wrong here; the log says what", "server_error")
