"""The API from its own description: whatever is sent, nothing breaks inside."""

import hypothesis
import pytest
import schemathesis

from tests.serving.fakes import HEADED, headed_adapter
from tests.serving.http.fakes import FILES, RunningServer
from tests.serving.jobs.fakes import CHAT, LINES
from veratune.formats import native
from veratune.serving.engine.scheduler import SchedulerConfig
from veratune.serving.http.app import create_app
from veratune.serving.http.config import HttpConfig

CALLS = (
    "POST /v1/feedback",
    "GET /v1/feedback",
    "DELETE /v1/feedback/{example}",
    "GET /v1/feedback/runs",
    "DELETE /v1/tenants/{tenant}",
    "GET /health", "GET /ready", "GET /metrics", "GET /v1/models", "GET /v1/models/{model}", "PUT /v1/adapters/{name}",
    "PUT /v1/adapters/{name}/examples", "GET /v1/adapters",
    "GET /v1/adapters/{name}", "DELETE /v1/adapters/{name}", "GET /v1/adapters/{name}/versions", "POST /v1/adapters/{name}/rollback",
    "POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter", "POST /v1/chat/completions", "POST /v1/completions", "POST /v1/embeddings",
    "POST /v1/classify", "POST /v1/score", "POST /v1/rerank", "POST /tokenize", "POST /detokenize", "POST /v1/responses",
    "POST /v1/batches", "GET /v1/batches", "GET /v1/batches/{batch}", "POST /v1/batches/{batch}/cancel",
    "POST /v1/files", "GET /v1/files", "GET /v1/files/{file}", "GET /v1/files/{file}/content", "DELETE /v1/files/{file}",
    "POST /v1/fine_tuning/jobs", "GET /v1/fine_tuning/jobs", "GET /v1/fine_tuning/jobs/{job}", "POST /v1/fine_tuning/jobs/{job}/cancel",
    "GET /v1/fine_tuning/jobs/{job}/events",
)  # fmt: skip


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    served = RunningServer(
        tmp_path_factory.mktemp("fuzz"),
        open=True,
        with_encoder=True,
        jobs={"base": CHAT},
        config=SchedulerConfig(max_num_seqs=4, max_total_tokens=10_000),
    )
    served.jobs.worker.command = ("true",)
    with served.http() as http:
        http.put("/v1/adapters/alice", content=FILES["alice"])
        http.put("/v1/adapters/taste", content=native.encode(headed_adapter(HEADED, 1)))
    file = served.jobs.add_file("default", "rows", "fine-tune", LINES).id
    job = served.jobs.create("default", "base", file).id
    config = HttpConfig(request_timeout=20, allowed_hosts=("testserver",))
    app = create_app(served.service, served.keys, served.jobs, config)
    yield (
        schemathesis.openapi.from_asgi("/openapi.json", app),
        {"name": "alice", "model": "alice", "file": file, "job": job},
    )
    served.stop()


def test_every_call_of_the_api_is_here(fuzzed):
    schema, _ = fuzzed
    assert {f"{r.ok().method.upper()} {r.ok().path}" for r in schema.get_all_operations()} == set(
        CALLS
    )


@pytest.mark.parametrize("examples", [15, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("call", CALLS)
def test_nothing_breaks_inside(fuzzed, call, examples):
    schema, known = fuzzed
    method, path = call.split(" ")
    seen = []

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=schema[path][method].as_strategy())
    def ask(case):
        if isinstance(
            case.body, dict
        ):  # half of them for what is there, or only a few reach the engines
            if "model" in case.body and len(seen) % 2:
                case.body["model"] = ("base", "alice", "reader", "taste")[len(seen) // 2 % 4]
            if "training_file" in case.body and len(seen) % 2:
                case.body["training_file"] = known["file"]
            for limit in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                if case.body.get(limit) is not None:
                    case.body[limit] = 3
            if case.body.get("min_tokens") is not None:
                case.body["min_tokens"] = 0
        if case.path_parameters and method != "DELETE" and len(seen) % 3 == 1:
            case.path_parameters = {
                name: known.get(name, value) for name, value in case.path_parameters.items()
            }
        reply = case.call()
        seen.append(reply.status_code)
        assert reply.status_code < 500, reply.text

    ask()
    assert seen
