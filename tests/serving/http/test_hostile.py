"""Patterns of strangers: expressions that hang a backtracking engine are answered at once."""

import dataclasses
import json
import time

import pytest

import veratune as vt
from tests.serving.fakes import QV, adapter, small_llama
from tests.serving.http.fakes import RunningServer
from tests.serving.jobs.fakes import CHAT, LINES
from veratune.formats import native

# Against "aaaa...": with Python's re each takes longer than the age of the universe.
EVIL = ("re:(a+)+$", "re:(a|aa)+$", "re:(.*a){25}b", "re:(model|model.|.*)*x")
LIMIT = 5.0  # seconds for an answer, on a busy machine


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    server = RunningServer(tmp_path_factory.mktemp("hostile"), jobs={"base": CHAT})
    server.jobs.worker.command = ("true",)
    yield server
    server.stop()


def evil_file(pattern):
    """An adapter whose config names its layers by a pattern, and whose layers hang it."""
    own = adapter(small_llama, QV, 0)
    name = "model.layers.0." + "a" * 60 + "!"
    first = next(iter(own.shapes))

    def renamed(entries):
        return {name if layer == first else layer: value for layer, value in entries.items()}

    changed = dataclasses.replace(
        own,
        config=vt.VeraConfig(rank=6, targets=(pattern, "query", "value")),
        shapes=renamed(own.shapes),
        d=renamed(own.d),
        b=renamed(own.b),
        layer_ranks=None if own.layer_ranks is None else renamed(own.layer_ranks),
        weight_fingerprint=None,
    )
    return native.encode(changed)


@pytest.mark.parametrize("pattern", EVIL)
def test_an_uploaded_adapter_is_answered_at_once(served, pattern):
    data = evil_file(pattern)
    start = time.monotonic()
    with served.http() as http:
        reply = http.put("/v1/adapters/evil", content=data)
        assert time.monotonic() - start < LIMIT
        assert reply.status_code == 400
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize("pattern", EVIL)
def test_a_jobs_targets_are_answered_at_once(served, pattern):
    with served.openai() as client, served.http() as http:
        file = client.files.create(file=LINES, purpose="fine-tune").id
        body = {"model": "base", "training_file": file, "vera": {"targets": [pattern]}}
        start = time.monotonic()
        reply = http.post("/v1/fine_tuning/jobs", json=body)
        assert time.monotonic() - start < LIMIT
        assert (reply.status_code, "targets" in reply.text) == (400, True)
        long = {**body, "vera": {"targets": ["re:" + "(a+)+" * 60]}}
        assert http.post("/v1/fine_tuning/jobs", content=json.dumps(long)).status_code == 400
        assert http.get("/health").status_code == 200
