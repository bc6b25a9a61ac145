"""HTTP: the OpenAI-compatible API, the adapters' own, and the page, as one application over a Service."""

import json
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import prometheus_client
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from veratune.errors import UnsupportedError, VeratuneError
from veratune.serving.http.routes import adapters, encoding, generation, health
from veratune.serving.http.routes import jobs as jobs_routes
from veratune.serving.http.routes.base import ApiError, to_api_error
from veratune.serving.jobs.jobs import Jobs
from veratune.serving.keys import Keys
from veratune.serving.service import Service

access = logging.getLogger("veratune.access")
MiB = 2**20
_UPLOADS = ("/v1/adapters/", "/v1/files")


def build(
    service: Service,
    keys: Keys,
    jobs: Jobs | None = None,
    *,
    upload_limit: int = 64 * MiB,
    body_limit: int = 4 * MiB,
    timeout: float = 600.0,
) -> FastAPI:
    """The application. upload_limit: bytes of an adapter's file or of rows to learn from; body_limit: of any other body; timeout: seconds
    of one answer.
    """
    app = FastAPI(title="veratune", openapi_url="/openapi.json", docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimits, upload=upload_limit, body=body_limit)
    app.add_middleware(_Log)
    app.state.service, app.state.keys, app.state.jobs, app.state.timeout = (
        service,
        keys,
        jobs,
        timeout,
    )
    app.state.registry = prometheus_client.CollectorRegistry()
    app.state.registry.register(health.Metrics(service))
    for part in (health, adapters, generation, encoding, jobs_routes):
        app.include_router(part.router)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(VeratuneError)
    async def own_error(request: Request, error: VeratuneError) -> Response:
        return to_api_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def bad_body(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:] or first["loc"])
        unknown = first["type"] == "extra_forbidden" or first.get("ctx", {}).get("max_length") == 0
        said = "it is not known here" if unknown else first["msg"].removeprefix("Value error, ")
        return ApiError(400, f"{where}: {said}").response()

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return ApiError(
            500, "something went wrong here; the log says what", "server_error"
        ).response()

    return app


class BodyLimits:
    """Refuses bodies that are too large, by their length where it is said and by counting where it is not."""

    def __init__(self, app: Callable[..., Awaitable[None]], upload: int, body: int) -> None:
        self.app, self.upload, self.body = app, upload, body

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        upload = scope["method"] in ("PUT", "POST") and scope["path"].startswith(_UPLOADS)
        limit, seen = self.upload if upload else self.body, 0
        said = dict(scope["headers"]).get(b"content-length", b"")
        refused = ApiError(413, f"the body is over {limit} bytes", code="body_too_large").response()
        if said.isdigit() and int(said) > limit:
            await refused(scope, receive, send)
            return

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise ApiError(413, f"the body is over {limit} bytes", code="body_too_large")
            return message

        try:
            await self.app(scope, counted, send)
        except ApiError:
            await refused(scope, receive, send)


class _Log:
    """One line of JSON for each request: caller, what, how it ended and how long it took; never what was asked or answered."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not access.isEnabledFor(logging.INFO):
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 0

        async def noted(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            line = {
                "time": round(time.time(), 3), "method": scope["method"], "path": scope["path"], "status": status,
                "ms": round(1000 * (time.perf_counter() - begin), 1), "tenant": scope.get("state", {}).get("tenant"),
            }  # fmt: skip
            access.info(json.dumps(line))


def log_to_stderr() -> None:
    """Let the server's logs go to standard error: one JSON line a request, and what went wrong."""
    plain = logging.StreamHandler(sys.stderr)
    plain.setFormatter(logging.Formatter("%(message)s"))
    access.addHandler(plain)
    access.setLevel(logging.INFO)
    access.propagate = False


def check_address(host: str, keys: Keys) -> None:
    """Raise UnsupportedError for an address that others reach, without keys."""
    if keys.path is None and host not in ("127.0.0.1", "::1", "localhost"):
        raise UnsupportedError(
            f"without keys the server listens on 127.0.0.1 alone, not on {host}: make some with veratune key --key-file FILE --tenants NAME, and give --key-file FILE"
        )
