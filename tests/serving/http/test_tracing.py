"""Traces that reach a collector: a span of each call, a span of each completion below it."""

import http.server
import threading

import pytest

from tests.serving.http.fakes import FILES, RunningServer
from veratune.errors import ConfigError
from veratune.serving.http.tracing import check_endpoint

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def collector():
    """Address of a collector, and the bodies that it got."""
    bodies = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies
        server.shutdown()
        thread.join()


def spans(bodies):
    for body in bodies:
        for resource in trace_service_pb2.ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                yield from scope.spans


def attributes(span):
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_calls_and_completions_are_traced_without_their_texts(tmp_path, collector):
    address, bodies = collector
    server = RunningServer(tmp_path, otlp_traces_endpoint=address)
    try:
        with server.http() as http:
            assert http.put("/v1/adapters/mine", content=FILES["alice"]).status_code == 201
            for stream in (False, True):
                body = {
                    "model": "mine",
                    "prompt": "wordless secret",
                    "max_tokens": 3,
                    "ignore_eos": True,
                    "n": 2,
                    "stream": stream,
                }
                parent = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
                assert http.post("/v1/completions", json=body, headers=parent).status_code == 200
            assert http.get("/health").status_code == 200
            assert http.get("/metrics").status_code == 200
    finally:
        server.stop()
    found = list(spans(bodies))
    calls = [s for s in found if s.name == "POST /v1/completions"]
    completions = [s for s in found if s.name == "llm_request"]
    assert len(calls) == 2
    assert len(completions) == 4
    assert {s.trace_id.hex() for s in [*calls, *completions]} == {TRACE}
    for span in completions:
        call = next(c for c in calls if c.span_id == span.parent_span_id)
        tolerance = 10**7  # of two clocks, in nanoseconds
        assert call.start_time_unix_nano <= span.start_time_unix_nano + tolerance
        assert span.start_time_unix_nano < span.end_time_unix_nano
        noted = attributes(span)
        assert noted["gen_ai.request.model"] == "mine"
        assert noted["gen_ai.usage.output_tokens"] == 3
        assert noted["gen_ai.usage.input_tokens"] > 0
        assert noted["veratune.tenant"] == "ann"
        waited = noted["gen_ai.latency.time_in_queue"]
        assert 0 <= waited <= noted["gen_ai.latency.time_to_first_token"]
        assert noted["gen_ai.latency.time_to_first_token"] <= noted["gen_ai.latency.e2e"]
        assert [event.name for event in span.events] == ["prefill", "first token"]
    assert {s.name for s in found} <= {
        "POST /v1/completions",
        "PUT /v1/adapters/{name}",
        "llm_request",
    }
    assert not any(b"secret" in body for body in bodies)


def test_without_a_collector_calls_are_answered(tmp_path):
    server = RunningServer(tmp_path, otlp_traces_endpoint="http://127.0.0.1:9/v1/traces")
    try:
        with server.http() as http:
            body = {"model": "base", "prompt": [4, 5], "max_tokens": 1}
            assert http.post("/v1/completions", json=body).status_code == 200
    finally:
        server.stop()


@pytest.mark.parametrize("endpoint", ["localhost:4318", "ftp://localhost/v1", "http://"])
def test_an_endpoint_that_is_no_address_is_refused(endpoint):
    with pytest.raises(ConfigError, match="an OTLP/HTTP address is wanted"):
        check_endpoint(endpoint)
