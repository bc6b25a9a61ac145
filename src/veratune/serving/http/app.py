"""The HTTP application: the OpenAI API, this server's own calls for adapters, and the page."""

import contextlib
from collections.abc import AsyncIterator

import prometheus_client
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from veratune.errors import UnsupportedError, VeratuneError
from veratune.serving.feedback.feedback import Feedback
from veratune.serving.http.batch_runner import BatchRunner
from veratune.serving.http.config import HttpConfig
from veratune.serving.http.dependencies import Context
from veratune.serving.http.errors import ApiError, to_api_error
from veratune.serving.http.limiter import TenantLimiter
from veratune.serving.http.metrics import EngineMetrics, Latencies
from veratune.serving.http.middleware import AccessLog, Authentication, BodyLimits, OriginCheck
from veratune.serving.http.pools import ThreadPools
from veratune.serving.http.routes import (
    adapters,
    batches,
    chat,
    encoding,
    health,
    responses,
    scoring,
    tokens,
)
from veratune.serving.http.routes import feedback as feedback_routes
from veratune.serving.http.routes import jobs as jobs_routes
from veratune.serving.http.tracing import Tracing
from veratune.serving.jobs.jobs import Jobs
from veratune.serving.keys import Keys
from veratune.serving.service import Service

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]", "::1")


def create_app(
    service: Service,
    keys: Keys,
    jobs: Jobs | None = None,
    config: HttpConfig | None = None,
    feedback: Feedback | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        service: Answers the calls.
        keys: Says who calls.
        jobs: Fine-tunes; None for a server without fine-tuning.
        config: Bounds and switches.
        feedback: Takes feedback; None for a server without.

    Returns:
        An ASGI application.
    """
    config = config or HttpConfig()
    registry = prometheus_client.CollectorRegistry()
    limiter = TenantLimiter(config.max_requests_per_minute, config.max_tokens_per_minute)
    pools = ThreadPools()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if runner is not None:
            await runner.start()
        yield
        if runner is not None:
            await runner.close()
        pools.close()
        if tracing is not None:
            tracing.close()

    app = FastAPI(
        title="veratune",
        openapi_url="/openapi.json" if config.openapi else None,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.registry = registry
    endpoint = config.otlp_traces_endpoint
    tracing = Tracing.to(endpoint) if endpoint is not None else None
    latencies = Latencies(registry)
    context = Context(service, jobs, config, limiter, pools, latencies, feedback, tracing)
    runner = BatchRunner(jobs, context, batches.ENDPOINTS) if jobs is not None else None
    app.state.context, app.state.batch_runner = context, runner
    registry.register(EngineMetrics(service))
    for room in (
        health,
        adapters,
        chat,
        responses,
        encoding,
        scoring,
        tokens,
        jobs_routes,
        batches,
        feedback_routes,
    ):
        app.include_router(room.router)
    if config.metrics:
        app.include_router(health.metrics_router)
    _add_middleware(app, keys, config, limiter)
    _add_error_handlers(app)
    if tracing is not None:
        tracing.instrument(app)
    return app


def check_address(host: str, keys: Keys) -> None:
    """Raise UnsupportedError for a server without keys on an address that other machines reach."""
    if keys.path is None and host not in ("127.0.0.1", "::1", "localhost"):
        raise UnsupportedError(
            f"a server without keys listens on 127.0.0.1 only, not on {host}: make a key with "
            "veratune key --key-file FILE --tenants NAME, and give --key-file FILE"
        )


def _add_middleware(app: FastAPI, keys: Keys, config: HttpConfig, limiter: TenantLimiter) -> None:
    """Add middleware, innermost first."""
    app.add_middleware(
        BodyLimits,
        upload=config.upload_limit,
        body=config.body_limit,
        timeout=config.body_timeout,
    )
    app.add_middleware(Authentication, keys=keys, limiter=limiter)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
        )
    hosts = config.allowed_hosts
    if keys.path is None:
        # DNS rebinding: a page's own host name may be pointed at 127.0.0.1.
        app.add_middleware(OriginCheck, origins=config.cors_origins)
        hosts = (*LOCAL_HOSTS, *hosts)
    if hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_middleware(AccessLog)


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error in the OpenAI API's shape."""

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(VeratuneError)
    async def on_veratune_error(request: Request, error: VeratuneError) -> Response:
        return to_api_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def on_invalid_body(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:] or first["loc"])
        unknown = first["type"] == "extra_forbidden" or first.get("ctx", {}).get("max_length") == 0
        reason = "it is not known here" if unknown else first["msg"].removeprefix("Value error, ")
        return ApiError(400, f"{where}: {reason}", param=where.partition(".")[0]).response()

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def on_unexpected_error(request: Request, error: Exception) -> Response:
        return ApiError(
            500, "internal error; the server's log has the cause", "server_error"
        ).response()
