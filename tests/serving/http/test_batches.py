"""Batches of requests with the openai client, through a restart, a cancellation, and errors."""

import dataclasses
import io
import json
import time

import openai
import pytest

from tests.serving.http.fakes import FILES, RunningServer
from tests.serving.jobs.fakes import CHAT
from veratune.errors import JobNotFoundError
from veratune.serving.http.batch_lines import parse_lines
from veratune.serving.jobs.batches import BatchRepository

TALK = [{"role": "user", "content": "hi"}]
CHAT_URL = "/v1/chat/completions"


@pytest.fixture
def served(tmp_path):
    server = RunningServer(tmp_path, with_encoder=True, jobs={"base": CHAT})
    with server.http() as http:
        assert http.put("/v1/adapters/alice", content=FILES["alice"]).status_code == 201
    yield server
    server.stop()


def line(number, url=CHAT_URL, **body):
    body = {"model": "alice", "messages": TALK, "max_tokens": 4, "temperature": 0} | body
    row = {"custom_id": f"n{number}", "method": "POST", "url": url, "body": body}
    return json.dumps(row) + "\n"


def create(client, text, endpoint=CHAT_URL, purpose="batch"):
    file = client.files.create(file=io.BytesIO(text.encode()), purpose=purpose)
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"a": "b"}
    )


def wait(client, batch, *statuses):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = client.batches.retrieve(batch.id)
        if found.status in statuses:
            return found
        time.sleep(0.05)
    raise AssertionError(f"still {found.status}")


def rows(client, file):
    return {
        row["custom_id"]: row["response"]
        for row in map(json.loads, client.files.content(file).text.splitlines())
    }


def test_every_request_has_its_result(served):
    text = "".join(line(i, seed=i) for i in range(6))
    text += line(6, model="ghost") + line(7, temperature=9) + line(8, stream=True)
    with served.openai() as client, served.openai("ben") as other:
        batch = create(client, text)
        assert (batch.endpoint, batch.metadata) == (CHAT_URL, {"a": "b"})
        done = wait(client, batch, "completed")
        counts = done.request_counts
        assert (counts.total, counts.completed, counts.failed) == (9, 6, 3)
        alone = client.chat.completions.create(
            model="alice", messages=TALK, max_tokens=4, temperature=0
        )
        found = rows(client, done.output_file_id)
        assert set(found) == {f"n{i}" for i in range(6)}
        for response in found.values():
            choice = response["body"]["choices"][0]
            assert choice["message"]["content"] == alone.choices[0].message.content
        failed = rows(client, done.error_file_id)
        assert {key: value["status_code"] for key, value in failed.items()} == {
            "n6": 404,
            "n7": 400,
            "n8": 400,
        }
        assert [b.id for b in client.batches.list()] == [batch.id]
        assert list(other.batches.list()) == []
        with pytest.raises(openai.NotFoundError):
            other.batches.retrieve(batch.id)
        vectors = {"model": "reader", "input": "light"}
        row = {"custom_id": "v", "method": "POST", "url": "/v1/embeddings", "body": vectors}
        texts = create(client, json.dumps(row), "/v1/embeddings")
        done = wait(client, texts, "completed")
        body = rows(client, done.output_file_id)["v"]["body"]
        assert len(body["data"][0]["embedding"]) == 32


def test_a_cancelled_batch_keeps_what_is_done(served):
    with served.openai() as client, served.slow(0.1):
        batch = create(client, "".join(line(i, max_tokens=20) for i in range(60)))
        wait(client, batch, "in_progress")
        time.sleep(0.5)
        client.batches.cancel(batch.id)
        done = wait(client, batch, "cancelled")
        assert done.request_counts.completed < 60


def test_a_restart_goes_on_after_the_last_result(tmp_path):
    store = BatchRepository(tmp_path)
    batch = store.update(store.add(("ann",), CHAT_URL, "file", {}), "in_progress", total=3)
    store.append_result(batch, {"custom_id": "a"})
    with (tmp_path / "batches" / f"{batch.id}.jsonl").open("a") as file:
        file.write('{"custom')
    store.close()
    store = BatchRepository(tmp_path)
    assert store.unfinished() == [batch]
    assert store.results(batch) == [{"custom_id": "a"}]
    store.append_result(batch, {"custom_id": "b"})
    assert len(store.results(batch)) == 2
    assert store.update(batch, "cancelling").status == "cancelling"
    assert store.update(batch, "finalizing").status == "cancelling"
    ended = store.update(batch, "cancelled")
    assert store.update(ended, "completed") == ended
    assert dataclasses.asdict(store.get("ann", batch.id))["total"] == 3
    store.delete_tenant("ann")
    assert (store.list_batches("ann"), list((tmp_path / "batches").iterdir())) == ([], [])
    with pytest.raises(JobNotFoundError):
        store.append_result(batch, {})
    store.close()


def test_wrong_files_are_refused_by_line():
    good = json.loads(line(0))
    for change, why in (
        ({"custom_id": ""}, "custom_id"),
        ({"method": "GET"}, "method and url"),
        ({"url": "/v1/models"}, "method and url"),
        ({"body": []}, "body"),
    ):
        text = line(0) + json.dumps({**good, "custom_id": "x", **change}) + "\n"
        lines, errors = parse_lines(text.encode(), CHAT_URL)
        assert len(lines) == 1
        assert [(number, why in message) for number, message in errors] == [(2, True)]
    assert "comes twice" in parse_lines((line(0) * 2).encode(), CHAT_URL)[1][0][1]
    assert len(parse_lines(b'{"a": 1}\n' * 500, CHAT_URL)[1]) == 21


def test_wrong_batches_are_refused(served):
    with served.openai() as client:
        failed = wait(client, create(client, line(0) + line(0)), "failed")
        assert (failed.errors.data[0].line, "twice" in failed.errors.data[0].message) == (2, True)
        with pytest.raises(openai.BadRequestError, match="one of /v1/chat/completions"):
            create(client, line(0), "/v1/moderations")
        with pytest.raises(openai.BadRequestError, match="one for 'batch' is wanted"):
            create(client, line(0), purpose="fine-tune")
        with pytest.raises(openai.NotFoundError):
            client.batches.create(
                input_file_id="file-none", endpoint=CHAT_URL, completion_window="24h"
            )
