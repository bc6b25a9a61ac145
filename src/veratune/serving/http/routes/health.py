"""Health, readiness, metrics, and the page."""

import asyncio
import time
from importlib import resources

import prometheus_client
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, PlainTextResponse

from veratune.errors import QueueFullError, VeratuneError
from veratune.serving.http.dependencies import Context, ContextDep
from veratune.serving.http.errors import ApiError

router = APIRouter()
metrics_router = APIRouter()
_PAGE = resources.files("veratune.serving.http").joinpath("page.html").read_text()
# The page runs its own script only, and calls this server only.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_READY_TIMEOUT = 3.0


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def home() -> HTMLResponse:
    """The page: two adapters beside each other, and live figures."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health() -> dict[str, str]:
    """Liveness: the process answers."""
    return {"status": "ok"}


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(context: ContextDep) -> dict[str, str]:
    """Readiness: 503 while draining, or with a problem of an engine, the store, its disk or
    jobs.
    """
    start = time.monotonic()
    try:
        check = context.pools.health.run(_problem, context)
        problem = await asyncio.wait_for(check, _READY_TIMEOUT)
    except (TimeoutError, QueueFullError):
        problem = f"the store has not answered for {time.monotonic() - start:.0f} s"
    except (VeratuneError, OSError):
        problem = "the store of adapters cannot be reached"
    if problem is not None:
        raise ApiError(503, problem, "server_error")
    return {"status": "ready"}


@metrics_router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> PlainTextResponse:
    """Metrics for Prometheus."""
    text = prometheus_client.generate_latest(request.app.state.registry)
    return PlainTextResponse(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)


def _problem(context: Context) -> str | None:
    problem = context.service.problem()
    if problem is None and context.jobs is not None:
        problem = context.jobs.problem()
    return problem
