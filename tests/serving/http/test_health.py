"""Health answers whatever the store does; readiness tells what is wrong."""

import sqlite3
import threading

import httpx2 as httpx
import pytest

from tests.serving.http.fakes import FILES, RunningServer
from tests.serving.jobs.fakes import CHAT


@pytest.fixture
def server(tmp_path):
    made = RunningServer(tmp_path, jobs={"base": CHAT})
    yield made
    made.stop()


def test_health_and_completions_go_on_while_writes_wait_for_a_locked_store(server):
    lock = sqlite3.connect(server.store.path, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    codes = []

    def put(i):
        with server.http() as http:
            codes.append(http.put(f"/v1/adapters/x{i}", content=FILES["alice"]).status_code)

    writers = [threading.Thread(target=put, args=(i,)) for i in range(12)]
    for writer in writers:
        writer.start()
    with server.http() as http:
        for _ in range(3):
            assert http.get("/health", timeout=5).status_code == 200
            assert http.get("/ready", timeout=5).status_code == 200
            body = {"model": "base", "prompt": [4, 5], "max_tokens": 1}
            assert http.post("/v1/completions", json=body, timeout=20).status_code == 200
    for writer in writers:
        writer.join()
    assert set(codes) == {503}
    lock.execute("ROLLBACK")
    lock.close()
    with server.http() as http:
        assert http.put("/v1/adapters/x", content=FILES["alice"]).status_code == 201


def test_head_works(server):
    for path in ("/health", "/ready"):
        reply = httpx.head(server.url + path)
        assert (reply.status_code, reply.content) == (200, b"")


def not_ready(server):
    reply = httpx.get(f"{server.url}/ready")
    assert reply.status_code == 503
    assert str(server.store.path.parent) not in reply.text
    return reply.json()["error"]["message"]


def test_a_full_disk_a_dead_job_runner_and_a_broken_store_are_not_ready(server, monkeypatch):
    assert httpx.get(f"{server.url}/ready").status_code == 200
    with monkeypatch.context() as patch:
        patch.setattr("veratune.serving.store.sqlite.MIN_FREE", 2**62)
        assert "the disk for adapters has" in not_ready(server)
    server.jobs.worker.close()
    assert not_ready(server) == "the job runner has stopped"
    server.store.close()
    assert not_ready(server) == "the store of adapters cannot be reached"
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_file_in_use_is_409(server):
    server.jobs.worker.close()
    with server.http() as http:
        rows = {"file": ("rows.jsonl", b'{"prompt": "light", "completion": "on"}\n')}
        file = http.post("/v1/files", files=rows, data={"purpose": "fine-tune"}).json()["id"]
        job = {"model": "base", "training_file": file, "vera": {"rank": 4}}
        assert http.post("/v1/fine_tuning/jobs", json=job).status_code == 200
        reply = http.delete(f"/v1/files/{file}")
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "in_use")
        nowhere = job | {"vera": {"targets": ["nowhere"]}}
        refused = http.post("/v1/fine_tuning/jobs", json=nowhere)
        assert (refused.status_code, "nowhere" in refused.text) == (400, True)


def test_metrics_have_latencies_under_vllms_names(server):
    with server.http() as http:
        body = {"model": "base", "prompt": [4, 5], "max_tokens": 3, "logit_bias": {"9": 100}}
        assert http.post("/v1/completions", json=body).status_code == 200
        text = http.get("/metrics").text
    for line in (
        'vllm:time_to_first_token_seconds_count{model_name="base"} 1.0',
        'vllm:time_per_output_token_seconds_count{model_name="base"} 1.0',
        'vllm:e2e_request_latency_seconds_count{model_name="base"} 1.0',
        'vllm:request_queue_time_seconds_count{model_name="base"} 1.0',
        'vllm:request_prefill_time_seconds_count{model_name="base"} 1.0',
        'vllm:num_requests_running{model_name="base"} 0.0',
        'vllm:generation_tokens_total{model_name="base"} 3.0',
        'vllm:request_success_total{finished_reason="length",model_name="base"} 1.0',
    ):
        assert line in text
