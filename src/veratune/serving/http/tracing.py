"""OpenTelemetry traces: a span for each API call, and one below it for each completion."""

import logging
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from veratune.errors import ConfigError
from veratune.serving.engine.requests import GenerationRequest

if TYPE_CHECKING:
    from fastapi import FastAPI
    from opentelemetry.context import Context as SpanContext
    from opentelemetry.sdk.trace.export import SpanExporter

_QUIET = "/health$,/ready$,/metrics$"  # polled every few seconds; their spans would hide the rest


def check_endpoint(endpoint: str) -> None:
    """Raise ConfigError for an endpoint that is no http(s) address, or without the packages."""
    address = urlsplit(endpoint)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ConfigError(
            f"--otlp-traces-endpoint {endpoint}: an OTLP/HTTP address is wanted, such as "
            "http://localhost:4318/v1/traces"
        )
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.instrumentation.fastapi  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--otlp-traces-endpoint wants {error.name!r}; install it with "
            "pip install 'veratune[traces]'"
        ) from None


class _OnceInAWhile(logging.Filter):
    """Lets one line through in ten minutes, shortened."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + 600
        record.msg, record.args = "traces are not delivered: %.120s", (record.getMessage(),)
        return True


class Tracing:
    """Sends spans in the background; a slow or missing collector costs requests nothing.

    Spans hold names, counts and times, never a prompt or a completion. The variables of the
    OpenTelemetry SDK apply, such as OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER and
    OTEL_EXPORTER_OTLP_HEADERS.

    Args:
        exporter: Takes the finished spans.
    """

    def __init__(self, exporter: "SpanExporter") -> None:
        """Start the thread that exports."""
        from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        # The exporter logs every attempt.
        logging.getLogger("opentelemetry.exporter.otlp.proto.http.trace_exporter").addFilter(
            _OnceInAWhile()
        )
        named = Resource({SERVICE_NAME: "veratune"}).merge(OTELResourceDetector().detect())
        self.provider = TracerProvider(resource=Resource.create().merge(named))
        self.provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self.provider.get_tracer("veratune")

    @classmethod
    def to(cls, endpoint: str) -> "Tracing":
        """Trace to an OTLP/HTTP collector. Raises ConfigError, see `check_endpoint`."""
        check_endpoint(endpoint)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return cls(OTLPSpanExporter(endpoint=endpoint))

    def instrument(self, app: "FastAPI") -> None:
        """Make a span of each API call, below the caller's own if it sends a traceparent."""
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

        FastAPIInstrumentor.instrument_app(
            app,
            tracer_provider=self.provider,
            excluded_urls=_QUIET,
            exclude_spans=["receive", "send"],
        )

    @staticmethod
    def current_span() -> "SpanContext":
        """The context of the span that the caller runs in."""
        from opentelemetry.context import get_current

        return get_current()

    def record(
        self, model: str, request: GenerationRequest, parent: "SpanContext | None" = None
    ) -> None:
        """Make the span of a completion that ended, with the times that the engine noted.

        Args:
            model: Name of the model, as in the response.
            request: The finished request.
            parent: Context of the API call; None for none.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode

        end = request.finished_time or time.perf_counter()
        wall = time.time() - time.perf_counter()
        span = self._tracer.start_span(
            "llm_request",
            context=parent,
            kind=SpanKind.INTERNAL,
            start_time=_nanoseconds(wall + request.arrival_time),
            attributes={
                "gen_ai.operation.name": "text_completion",
                "gen_ai.request.model": model,
                "gen_ai.request.max_tokens": request.sampling.max_tokens,
                "gen_ai.request.temperature": request.sampling.temperature,
                "gen_ai.usage.input_tokens": len(request.tokens),
                "gen_ai.usage.output_tokens": len(request.output_token_ids),
                "gen_ai.usage.cache_read.input_tokens": request.cached_tokens,
                "gen_ai.latency.e2e": end - request.arrival_time,
                "veratune.tenant": request.tenant,
            },
        )
        ready, first = request.adapter_ready_time, request.first_token_time
        if ready is not None:
            span.set_attribute("gen_ai.latency.time_in_queue", ready - request.arrival_time)
            span.add_event("prefill", timestamp=_nanoseconds(wall + ready))
        if first is not None:
            span.set_attribute("gen_ai.latency.time_to_first_token", first - request.arrival_time)
            span.add_event("first token", timestamp=_nanoseconds(wall + first))
        else:
            span.set_status(Status(StatusCode.ERROR, "it ended before its first token"))
        span.end(_nanoseconds(wall + end))

    def close(self) -> None:
        """Send what is left and stop."""
        self.provider.shutdown()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
