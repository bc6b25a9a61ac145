"""Metrics for Prometheus: this server's own names, and vLLM's for existing dashboards and
gateways.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from veratune.serving.engine.protocol import ServingEngine
from veratune.serving.engine.requests import GenerationRequest
from veratune.serving.service import Service

_FAST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20)
_SLOW = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)


class Latencies:
    """Histograms of generation requests, under vLLM's names."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Register the histograms."""

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"vllm:{name}_seconds", text, ["model_name"], buckets=buckets, registry=registry
            )

        self._first = histogram("time_to_first_token", "arrival to the first token", _FAST)
        self._token = histogram("time_per_output_token", "between two output tokens", _FAST)
        self._queue = histogram("request_queue_time", "arrival to the start of prefill", _SLOW)
        self._prefill = histogram("request_prefill_time", "prefill to the first token", _SLOW)
        self._decode = histogram("request_decode_time", "the first token to the end", _SLOW)
        self._whole = histogram("e2e_request_latency", "arrival to the end", _SLOW)

    def observe(self, base: str, request: GenerationRequest) -> None:
        """Count a request that ended; one that made no token counts nowhere."""
        ready, first, end = (
            request.adapter_ready_time,
            request.first_token_time,
            request.finished_time,
        )
        if ready is None or first is None or end is None:
            return
        self._queue.labels(base).observe(ready - request.arrival_time)
        self._prefill.labels(base).observe(first - ready)
        self._first.labels(base).observe(first - request.arrival_time)
        self._decode.labels(base).observe(end - first)
        self._whole.labels(base).observe(end - request.arrival_time)
        tokens = len(request.output_token_ids)
        if tokens > 1:
            self._token.labels(base).observe((end - first) / (tokens - 1))


@dataclasses.dataclass(frozen=True)
class _Figure:
    """A value of an engine: its names, its meaning, and where it is read."""

    name: str
    text: str
    counter: bool
    read: Callable[[ServingEngine[Any]], float]
    vllm: str = ""


class EngineMetrics:
    """A Prometheus collector that reads the engines' own counters at every scrape."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        """All values, one line for each base model."""
        for figure in _FIGURES:
            yield self._family(f"veratune_{figure.name}", "base", figure)
            if figure.vllm:
                yield self._family(f"vllm:{figure.vllm}", "model_name", figure)
        for name, labels in (
            ("veratune_requests", ["base", "how"]),
            ("vllm:request_success", ["model_name", "finished_reason"]),
        ):
            ended = CounterMetricFamily(name, "requests that ended", labels=labels)
            for base, loop in self.service.loops.items():
                for how, count in sorted(loop.stats.finished.items()):
                    if how in ("stop", "length") or name.startswith("veratune"):
                        ended.add_metric([base, how], count)
            yield ended
        if self.service.router is not None:
            chosen = CounterMetricFamily(
                "veratune_auto_choices",
                'calls for the model "auto", by what was chosen',
                labels=["choice"],
            )
            for choice, count in sorted(self.service.router.choices.items()):
                chosen.add_metric([choice], count)
            yield chosen

    def _family(self, name: str, label: str, figure: _Figure) -> Metric:
        kind = CounterMetricFamily if figure.counter else GaugeMetricFamily
        family = kind(name, figure.text, labels=[label])
        for base, loop in self.service.loops.items():
            family.add_metric([base], figure.read(loop))
        return family


_FIGURES = (
    _Figure("adapters_loaded", "adapters in memory", False, lambda e: len(e.pool)),
    _Figure("adapters_capacity", "adapter slots of each kind", False, lambda e: e.pool.slots),
    _Figure("adapter_bytes", "bytes of the adapters in memory", False, lambda e: e.pool.bytes),
    _Figure(
        "frozen_bytes",
        "bytes of A and B of all adapters in memory",
        False,
        lambda e: e.pool.frozen_bytes,
    ),
    _Figure(
        "prefix_cache_bytes",
        "bytes of the KV cache kept for later requests",
        False,
        lambda e: e.prefix_cache_bytes,
    ),
    _Figure(
        "requests_running",
        "requests that run",
        False,
        lambda e: e.scheduler.running,
        "num_requests_running",
    ),
    _Figure(
        "requests_waiting",
        "requests that wait",
        False,
        lambda e: e.scheduler.waiting,
        "num_requests_waiting",
    ),
    _Figure(
        "adapter_hits",
        "requests whose adapter was in memory",
        True,
        lambda e: e.pool.stats.hits,
    ),
    _Figure("adapter_loads", "adapters loaded", True, lambda e: e.pool.stats.loads),
    _Figure("adapter_evictions", "adapters evicted", True, lambda e: e.pool.stats.evictions),
    _Figure(
        "adapter_load_seconds",
        "seconds spent loading adapters",
        True,
        lambda e: e.pool.stats.load_seconds,
    ),
    _Figure("steps", "engine steps", True, lambda e: e.stats.steps),
    _Figure("step_seconds", "seconds spent in steps", True, lambda e: e.stats.seconds),
    _Figure(
        "prompt_tokens",
        "prompt tokens computed",
        True,
        lambda e: e.stats.prompt_tokens,
        "prompt_tokens",
    ),
    _Figure(
        "cached_prompt_tokens",
        "prompt tokens taken from the prefix cache",
        True,
        lambda e: e.stats.cached_tokens,
        "prefix_cache_hits",
    ),
    _Figure(
        "generation_tokens",
        "tokens generated",
        True,
        lambda e: e.stats.generation_tokens,
        "generation_tokens",
    ),
)
