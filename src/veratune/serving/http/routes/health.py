"""What balancers, Prometheus and people look at: health, readiness, metrics, and the page."""

from collections.abc import Callable
from importlib import resources
from typing import Any

import prometheus_client
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, PlainTextResponse
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from veratune.serving.engine.loop import Loop
from veratune.serving.http.routes.base import ApiError, ServiceDep
from veratune.serving.service import Service

router = APIRouter()
_PAGE = resources.files("veratune.serving.http").joinpath("page.html").read_text()
# Only what the page itself brings runs, and it talks to nobody but this server.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
def home() -> HTMLResponse:
    """The page: two adapters beside each other, and live figures."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})


@router.get("/health")
def health() -> dict[str, str]:
    """Whether the process lives."""
    return {"status": "ok"}


@router.get("/ready")
def ready(service: ServiceDep) -> dict[str, str]:
    """Whether the server can answer."""
    reason = service.ready()
    if reason is not None:
        raise ApiError(503, reason, "server_error")
    return {"status": "ready"}


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(request: Request) -> PlainTextResponse:
    """Counts for Prometheus."""
    text = prometheus_client.generate_latest(request.app.state.registry)
    return PlainTextResponse(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)


class Metrics:
    """What Prometheus reads: asked for at every scrape, kept nowhere else. One line for each base model."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Any:
        """All figures."""
        for name, (about, counts, of) in _FIGURES.items():
            family: Any = (CounterMetricFamily if counts else GaugeMetricFamily)(
                f"veratune_{name}", about, labels=["base"]
            )
            for base, loop in self.service.loops.items():
                family.add_metric([base], of(loop))
            yield family
        ended = CounterMetricFamily(
            "veratune_requests", "requests that ended", labels=["base", "how"]
        )
        for base, loop in self.service.loops.items():
            for how, count in sorted(loop.stats.finished.items()):
                ended.add_metric([base, how], count)
        yield ended


_FIGURES: dict[str, tuple[str, bool, Callable[[Loop[Any]], float]]] = {
    "adapters_loaded": ("adapters in memory", False, lambda loop: len(loop.pool)),
    "adapters_capacity": ("slots of each kind of adapter", False, lambda loop: loop.pool.slots),
    "adapter_bytes": ("bytes of the adapters in memory", False, lambda loop: loop.pool.bytes),
    "frozen_bytes": (
        "bytes of the frozen matrices of all kinds of adapters",
        False,
        lambda loop: loop.pool.frozen_bytes,
    ),
    "prefix_cache_bytes": (
        "bytes of what is kept of prompts that were read",
        False,
        lambda loop: loop.prefix_cache_bytes,
    ),
    "requests_running": ("requests that run", False, lambda loop: loop.scheduler.running),
    "requests_waiting": ("requests that wait", False, lambda loop: loop.scheduler.waiting),
    "adapter_hits": (
        "requests whose adapter was in memory",
        True,
        lambda loop: loop.pool.stats.hits,
    ),
    "adapter_loads": ("adapters loaded", True, lambda loop: loop.pool.stats.loads),
    "adapter_evictions": ("adapters that made room", True, lambda loop: loop.pool.stats.evictions),
    "adapter_load_seconds": (
        "spent in putting adapters into memory",
        True,
        lambda loop: loop.pool.stats.load_seconds,
    ),
    "steps": ("steps of the engine", True, lambda loop: loop.stats.steps),
    "step_seconds": ("spent in steps", True, lambda loop: loop.stats.seconds),
    "prompt_tokens": ("tokens read", True, lambda loop: loop.stats.prompt_tokens),
    "cached_prompt_tokens": (
        "tokens of prompts that had been read before",
        True,
        lambda loop: loop.stats.cached_tokens,
    ),
    "generation_tokens": ("tokens made", True, lambda loop: loop.stats.generation_tokens),
}
