"""model="auto" over HTTP: which adapter answers, what the reply names, and what is refused."""

import json
import time

import openai
import pytest

from tests.serving.http.fakes import FILES, RunningServer, greedy
from tests.serving.jobs.fakes import CHAT

LIGHTS = [f"turn the light {word} in kitchen {i}" for i, word in enumerate(["on", "off"] * 6)]
FILMS = [f"{word} awful movie {i} I love it" for i, word in enumerate(["great", "bad"] * 6)]
NOISE = "%%%% zzzz qqqq 9999 &&&& ~~~~"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = RunningServer(tmp_path_factory.mktemp("auto"), jobs={"base": CHAT})
    with made.http("ann") as ann, made.http("ben") as ben:
        for http, name, examples in (
            (ann, "alice", LIGHTS),
            (ann, "bob", FILMS),
            (ben, "new", FILMS),
        ):
            assert http.put(f"/v1/adapters/{name}", content=FILES[name]).status_code == 201
            reply = http.put(f"/v1/adapters/{name}/examples", json=examples)
            assert reply.status_code == 200, reply.text
            assert reply.json()["examples"] == len(examples)
    yield made
    made.stop()


def tokens(server, text):
    return server.engine.tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("who", "model", "text", "chosen"),
    [
        ("ann", "auto", LIGHTS[4], "alice"),
        ("ann", "auto", FILMS[3], "bob"),
        ("ann", "auto", NOISE, "base"),
        ("ben", "auto", FILMS[3], "new"),
        ("both", "auto", FILMS[3], "bob"),
        ("both", "auto/ben", FILMS[3], "ben/new"),
        ("both", "auto/ann", FILMS[3], "bob"),
    ],
)
def test_the_reply_names_the_adapter_that_completed(server, who, model, text, chosen):
    client = server.openai(who)
    reply = client.completions.create(model=model, prompt=text, max_tokens=8, temperature=0)
    assert reply.model == chosen
    assert reply.choices[0].text == greedy(chosen.rpartition("/")[2], tokens(server, text))
    ids = client.completions.create(
        model=model, prompt=tokens(server, text), max_tokens=8, temperature=0
    )
    assert (ids.model, ids.choices[0].text) == (chosen, reply.choices[0].text)


def test_chats_responses_and_streams_are_chosen_by_what_the_user_wrote(server):
    client = server.openai()
    talk = [
        {"role": "system", "content": FILMS[0]},
        {"role": "user", "content": LIGHTS[1]},
        {"role": "assistant", "content": FILMS[1]},
        {"role": "user", "content": LIGHTS[2]},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": NOISE},
    ]
    named = client.chat.completions.create(
        model="alice", messages=talk, max_tokens=6, temperature=0
    )
    reply = client.chat.completions.create(model="auto", messages=talk, max_tokens=6, temperature=0)
    assert (reply.model, reply.choices) == ("alice", named.choices)
    events = list(
        client.chat.completions.create(
            model="auto", messages=talk, max_tokens=6, temperature=0, stream=True
        )
    )
    assert {event.model for event in events} == {"alice"}
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text == named.choices[0].message.content
    response = client.responses.create(
        model="auto", instructions=LIGHTS[0], input=FILMS[2], max_output_tokens=4
    )
    assert response.model == "bob"
    stream = client.responses.create(model="auto", input=FILMS[2], max_output_tokens=4, stream=True)
    models = {event.response.model for event in stream if hasattr(event, "response")}
    assert models == {"bob"}


def test_batches_choose_for_each_line(server):
    client = server.openai()
    lines = [
        {
            "custom_id": str(i),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "auto",
                "messages": [{"role": "user", "content": text}],
                "max_tokens": 2,
            },
        }
        for i, text in enumerate((LIGHTS[0], FILMS[0], NOISE))
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("b.jsonl", data), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    end = time.time() + 30
    while batch.status not in ("completed", "failed") and time.time() < end:
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    rows = [json.loads(r) for r in client.files.content(batch.output_file_id).text.splitlines()]
    found = {row["custom_id"]: row["response"]["body"]["model"] for row in rows}
    assert found == {"0": "alice", "1": "bob", "2": "base"}


def test_models_list_auto_where_there_is_a_choice(server):
    names = [model.id for model in server.openai("ann").models.list().data]
    assert names == ["base", "auto", "alice", "bob"]
    assert server.openai().models.retrieve("auto").id == "auto"


def test_a_metric_counts_the_choices(server):
    def counts():
        with server.http() as http:
            lines = http.get("/metrics").text.splitlines()
        found = [line.split() for line in lines if line.startswith("veratune_auto_choices_total")]
        return {name.partition('"')[2].partition('"')[0]: float(value) for name, value in found}

    before = counts()
    for text in (LIGHTS[0], NOISE, FILMS[0]):
        server.openai().completions.create(model="auto", prompt=text, max_tokens=1)
    after = counts()
    assert after["adapter"] - before["adapter"] == 2
    assert after["base"] - before["base"] == 1


@pytest.mark.parametrize(
    ("who", "path", "body", "status", "words"),
    [
        ("ann", "completions", {"model": "auto/ben", "prompt": "x"}, 404, "may not use it"),
        ("ann", "completions", {"model": "auto/none", "prompt": "x"}, 404, "may not use it"),
        ("ann", "completions", {"model": "auto", "prompt": " "}, 400, "is empty"),
        ("ann", "completions", {"model": "auto", "prompt": [LIGHTS[0], FILMS[0]]}, 400, "different"),
        ("ann", "completions", {"model": "auto:0.5+alice:0.5", "prompt": "x"}, 400, "by the input"),
        (
            "ann",
            "chat/completions",
            {"model": "auto", "messages": [{"role": "system", "content": "x"}]},
            400,
            "there is none with text",
        ),
        ("ann", "fine_tuning/jobs", {"model": "base", "training_file": "x", "suffix": "auto"}, 400,
         "reserved"),
    ],
)  # fmt: skip
def test_what_is_refused(server, who, path, body, status, words):
    with server.http(who) as http:
        reply = http.post(f"/v1/{path}", json=body)
    assert (reply.status_code, words in reply.text) == (status, True), reply.text


def test_the_name_auto_is_reserved(server):
    with server.http() as http:
        reply = http.put("/v1/adapters/auto", content=FILES["alice"])
        assert (reply.status_code, "reserved" in reply.text) == (400, True)
        reply = http.post("/tokenize", json={"model": "auto", "prompt": "x"})
        assert (reply.status_code, "name an adapter" in reply.text) == (400, True)
    with pytest.raises(openai.BadRequestError, match="name an adapter"):
        server.openai().chat.completions.create(
            model="alice:0.5+auto:0.5", messages=[{"role": "user", "content": "x"}]
        )


@pytest.mark.parametrize(
    ("name", "body", "status", "words"),
    [
        ("alice", json.dumps(LIGHTS[:3]), 400, "at least 5 are wanted"),
        ("alice", json.dumps([str(i) for i in range(200)]), 400, "at most 128"),
        ("alice", "no", 400, "no JSON"),
        ("none", json.dumps(LIGHTS), 404, "no adapter"),
        ("new", json.dumps(LIGHTS), 404, "no adapter"),
        ("alice", "x" * (5 * 2**20), 413, "over"),
    ],
)
def test_examples_that_cannot_be_taken(server, name, body, status, words):
    with server.http() as http:
        reply = http.put(f"/v1/adapters/{name}/examples", content=body)
    assert (reply.status_code, words in reply.text) == (status, True), reply.text


def test_a_deleted_adapter_is_chosen_no_more(server):
    with server.http("ben") as http:
        for name in ("here", "gone"):
            assert http.put(f"/v1/adapters/{name}", content=FILES["alice"]).status_code == 201
        lines = "\n".join(json.dumps({"prompt": text}) for text in LIGHTS)
        assert http.put("/v1/adapters/gone/examples", content=lines).status_code == 200
        client = server.openai("ben")

        def chosen():
            return client.completions.create(model="auto", prompt=LIGHTS[5], max_tokens=1).model

        assert chosen() == "gone"
        http.delete("/v1/adapters/gone")
        assert chosen() == "base"


def test_a_deleted_adapters_embedding_leaves_memory_at_once(server):
    server.service.router.index.refresh_seconds, before = 60, 2.0
    try:
        server.service.put("cleo", "x", FILES["alice"])
        server.service.put_examples("cleo", "x", LIGHTS)
        assert server.service.router.has_choice("cleo")
        server.service.delete("cleo", "x")
        assert not server.service.router.has_choice("cleo")
    finally:
        server.service.router.index.refresh_seconds = before
