"""Feedback over HTTP, and the deletion of a tenant. Training: tests/fleet, tests/cli."""

import json

import openai
import pytest

from tests.serving.http.fakes import FILES, RunningServer
from tests.serving.jobs.fakes import CHAT, LINES

TALK = [{"role": "user", "content": "turn the light on"}]
COMPLETION = {"role": "assistant", "content": "no"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    found = RunningServer(tmp_path_factory.mktemp("feedback"), jobs={"base": CHAT}, feedback=True)
    yield found
    found.stop()


def send(client, **body):
    return client.post("/feedback", body={"model": "base", **body}, cast_to=dict)


def test_a_correction_takes_the_place_of_the_completion(served):
    with served.openai() as client:
        for talk in (TALK, [*TALK, COMPLETION]):
            stored = send(client, messages=talk, correction="light on")
            assert stored["messages"] == [*TALK, {"role": "assistant", "content": "light on"}]
            assert (stored["model"], stored["kind"]) == ("personal", "correction")
        rated = send(client, messages=[*TALK, COMPLETION], rating="down")
        listed = client.get("/feedback?limit=2", cast_to=dict)
        assert listed["data"][0]["id"] == rated["id"]
        assert listed["has_more"]
        client.delete(f"/feedback/{rated['id']}", cast_to=dict)
        assert client.get("/feedback/runs", cast_to=dict)["data"] == []


def test_an_adapter_gets_its_own_feedback_and_other_tenants_see_none(served):
    with served.http("ann") as ann, served.openai("ben") as ben:
        assert ann.put("/v1/adapters/alice", content=FILES["alice"]).status_code == 201
        body = {"model": "alice", "messages": [*TALK, COMPLETION], "rating": "up"}
        assert ann.post("/v1/feedback", json=body).json()["model"] == "alice"
        assert ben.get("/feedback", cast_to=dict)["data"] == []
        with pytest.raises(openai.NotFoundError):
            send(ben, model="ann/alice", messages=TALK, correction="x")
        assert ann.delete("/v1/tenants/ben").status_code == 404


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": TALK}, "either a rating or a correction"),
        ({"messages": TALK, "rating": "up", "correction": "x"}, "either a rating or a correction"),
        ({"messages": TALK, "rating": "up"}, "a user's message and its completion"),
        ({"messages": [COMPLETION], "correction": "x"}, "a user's message and its completion"),
        ({"messages": TALK, "correction": "  "}, "no text to learn"),
        ({"messages": TALK * 64, "correction": "x"}, "65 messages"),
        ({"messages": TALK * 65, "correction": "x"}, "at most 64"),
        ({"messages": TALK, "correction": "x" * 32_768}, "at most 32,768"),
        ({"messages": TALK, "correction": "x" * 32_769}, "at most 32768"),
        ({"messages": TALK, "correction": "x", "mood": 1}, "mood"),
        ({"messages": TALK, "correction": "x", "model": "a:1+b:1"}, "a mix is not trained"),
        ({"messages": [{"role": "tool", "content": "x"}], "rating": "up"}, "role"),
    ],
)
def test_what_cannot_be_learned_is_400(body, words, served):
    with served.http() as http:
        response = http.post("/v1/feedback", json={"model": "base"} | body)
        assert response.status_code == 400, response.text
        assert words in response.json()["error"]["message"]


def test_a_deleted_tenant_leaves_nothing_but_names(tmp_path, caplog):
    caplog.set_level("INFO")
    served = RunningServer(tmp_path, jobs={"base": CHAT}, feedback=True)
    secret = "xyzzy plugh"
    try:
        with served.http("ann") as ann, served.http("ben") as ben:
            for http in (ann, ben):
                http.put("/v1/adapters/alice", content=FILES["alice"])
                http.put("/v1/adapters/alice", content=FILES["new"])
            body = {"model": "base", "messages": TALK, "correction": secret}
            for _ in range(4):
                assert ann.post("/v1/feedback", json=body).status_code == 201
            row = json.dumps({"prompt": "turn", "completion": secret}).encode() + b"\n"
            file = {"file": ("r.jsonl", row + LINES)}
            form = {"purpose": "fine-tune"}
            uploaded = ann.post("/v1/files", files=file, data=form).json()
            job = {"model": "base", "training_file": uploaded["id"]}
            assert ann.post("/v1/fine_tuning/jobs", json=job).status_code == 200
            assert secret.encode() in everything(tmp_path)
            deleted = ann.delete("/v1/tenants/ann").json()
            kinds = ("feedback", "jobs", "files", "adapters")
            assert [deleted[kind] for kind in kinds] == [4, 1, 1, 1]
            left = everything(tmp_path)
            assert secret.encode() not in left
            assert secret not in caplog.text
            assert left.count(FILES["new"][-64:]) == 1  # ben's
            for path in ("/v1/feedback", "/v1/files", "/v1/fine_tuning/jobs", "/v1/adapters"):
                assert ann.get(path).json()["data"] == []
            assert ben.get("/v1/adapters/alice").content == FILES["new"]
    finally:
        served.stop()


def everything(folder):
    """The bytes of all files below a folder."""
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())
