"""The API over a real socket: the openai client unchanged, adapters in and out, and nothing of one tenant for another."""

import contextlib
import dataclasses
import re
import threading
import time

import httpx2 as httpx
import openai
import pytest
import torch

from tests import fakes
from tests.serving.fakes import HEADED, QV, adapter, encode_alone, headed_adapter
from tests.serving.http.fakes import ADAPTERS, FILES, RunningServer, greedy
from veratune.errors import AdapterNotFoundError, UnsupportedError
from veratune.formats import native
from veratune.serving.engine.scheduler import SchedulerConfig
from veratune.serving.http.app import check_address
from veratune.serving.keys import Caller, Keys


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    found = RunningServer(
        tmp_path_factory.mktemp("served"), upload_limit=200_000, body_limit=20_000
    )
    with found.http("ann") as ann, found.http("ben") as ben:
        assert ann.put("/v1/adapters/alice", content=FILES["alice"]).status_code == 201
        assert ben.put("/v1/adapters/bob", content=FILES["bob"]).status_code == 201
    yield found
    found.stop()


def test_the_openai_client_runs_unchanged(served):
    made = fakes.tokenizer()
    talk = [{"role": "user", "content": "turn the light on"}]
    ids = made(
        made.apply_chat_template(talk, tokenize=False, add_generation_prompt=True),
        add_special_tokens=False,
    )["input_ids"]
    with served.openai() as client:
        for model, own in (("alice", "alice"), ("base", None)):
            whole = client.chat.completions.create(
                model=model, messages=talk, temperature=0, max_tokens=8
            )
            assert whole.choices[0].message.content == greedy(own, ids)
            assert whole.usage.prompt_tokens == len(ids)
            stream = client.chat.completions.create(
                model=model,
                messages=talk,
                temperature=0,
                max_tokens=8,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = list(stream)
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == greedy(
                own, ids
            )
            assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in (
                "stop",
                "length",
            )
            assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
        plain = client.completions.create(
            model="alice", prompt=[4, 5, 6], temperature=0, max_tokens=8, logprobs=2
        )
        assert plain.choices[0].text == greedy("alice", [4, 5, 6])
        assert len(plain.choices[0].logprobs.tokens) == plain.usage.completion_tokens
        told = client.chat.completions.create(
            model="alice", messages=talk, temperature=0, max_tokens=2, logprobs=True, top_logprobs=2
        )
        assert len(told.choices[0].logprobs.content[0].top_logprobs) == 2
        assert [m.id for m in client.models.list()] == ["base", "alice"]
        assert client.models.retrieve("alice").id == "alice"


def test_one_call_may_want_several_answers(served):
    talk = [{"role": "user", "content": "hi"}]
    with served.openai() as client, served.slow(0):
        options = {"model": "alice", "temperature": 1.0, "max_tokens": 6}
        several = client.chat.completions.create(messages=talk, n=3, seed=5, **options)
        single = [
            client.chat.completions.create(messages=talk, seed=5 + i, **options) for i in range(3)
        ]
        wanted = [one.choices[0].message.content for one in single]
        assert [(c.index, c.message.content) for c in several.choices] == list(enumerate(wanted))
        assert len(set(wanted)) > 1
        assert (several.usage.prompt_tokens, several.usage.completion_tokens) == (
            single[0].usage.prompt_tokens,
            18,
        )
        streamed = ["", "", ""]
        for chunk in client.chat.completions.create(
            messages=talk, n=3, seed=5, stream=True, **options
        ):
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
        assert streamed == wanted
        prompts = [[4, 5], [6, 7, 8], [9]]
        many = client.completions.create(
            model="alice", prompt=prompts, n=2, temperature=0, max_tokens=6
        )
        alone_ = [
            client.completions.create(model="alice", prompt=p, temperature=0, max_tokens=6)
            .choices[0]
            .text
            for p in prompts
        ]
        assert [c.text for c in many.choices] == [text for text in alone_ for _ in range(2)]
        assert (many.usage.prompt_tokens, many.usage.completion_tokens) == (6, 36)
        assert (
            len(
                client.completions.create(model="alice", prompt=["hi", "you"], max_tokens=1).choices
            )
            == 2
        )
        with pytest.raises(openai.BadRequestError, match="64 completions at most"):
            client.completions.create(model="alice", prompt=prompts, n=30)
        with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
            client.completions.create(model="alice", prompt=["hi", ""])
    served.until_idle()


def test_null_is_as_good_as_not_given_and_what_is_not_done_may_be_sent_empty(served):
    talk = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}]
    with served.openai() as client:
        plain = client.chat.completions.create(
            model="alice", messages=talk, temperature=0, max_tokens=4
        )
        same = client.chat.completions.create(
            model="alice", messages=talk, temperature=0, max_tokens=4, top_p=None, n=None, stop=None, stream=None, seed=None, logprobs=None,
            frequency_penalty=None, presence_penalty=0.0, logit_bias={}, tools=[], tool_choice="auto", response_format={"type": "text"},
            parallel_tool_calls=None, extra_body={"top_k": -1},
        )  # fmt: skip
        assert same.choices[0].message.content == plain.choices[0].message.content
        exact = client.chat.completions.create(
            model="alice", messages=talk, temperature=0, max_tokens=4, logit_bias={"5": 100}
        )
        assert exact.choices[0].message.content == fakes.tokenizer().decode([5] * 4)
    with served.http() as http:
        for field, value in (
            ("tools", [{}]),
            ("response_format", {"type": "yaml"}),
            ("logit_bias", {"x": 1}),
            ("model", None),
        ):
            refused = http.post(
                "/v1/chat/completions", json={"model": "alice", "messages": talk} | {field: value}
            )
            assert (refused.status_code, field in refused.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    ("call", "content"),
    [
        (
            "chat/completions",
            b'{"model": "alice", "messages": [{"role": "user", "content": "\\ud800"}]}',
        ),
        ("chat/completions", b'{"model": "alice", "\\udc00": 1}'),
        ("completions", b'{"model": "alice", "prompt": ["x", "\\ud800"]}'),
        ("completions", b'{"model": "\\ud800", "prompt": "x"}'),
        ("completions", b'{"model": "alice", "prompt": "x", "temperature": NaN}'),
        ("completions", b'{"model": ' + b"[" * 940 + b"]" * 940 + b"}"),
        ("completions", b"[" * 20_000),
    ],
)
def test_json_that_is_no_text_is_refused(served, call, content):
    with served.http() as http:
        refused = http.post(
            f"/v1/{call}", content=content, headers={"content-type": "application/json"}
        )
    assert refused.status_code == 400
    assert refused.json()["error"]["message"]


def test_errors_are_the_clients_own_classes(served):
    talk = [{"role": "user", "content": "hi"}]
    with served.openai() as client:
        with pytest.raises(
            openai.NotFoundError, match="does not exist, or this key may not use it"
        ):
            client.chat.completions.create(model="nobody", messages=talk)
        with pytest.raises(openai.BadRequestError, match="over the 128"):
            client.completions.create(model="base", prompt=[4] * 200)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model="base", messages=talk, temperature=5)
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_an_adapter_comes_is_updated_rolled_back_and_goes(served):
    with served.http() as http, served.openai() as client:

        def says():
            return (
                client.completions.create(model="mine", prompt=[7, 8], temperature=0, max_tokens=8)
                .choices[0]
                .text
            )

        first = http.put("/v1/adapters/mine", content=FILES["alice"])
        assert (first.status_code, first.json()["version"], first.json()["bytes"]) == (
            201,
            1,
            len(FILES["alice"]),
        )
        assert says() == greedy("alice", [7, 8])
        assert http.put("/v1/adapters/mine", content=FILES["new"]).json()["version"] == 2
        assert says() == greedy("new", [7, 8]) != greedy("alice", [7, 8])
        assert http.get("/v1/adapters/mine").content == FILES["new"]
        assert http.get("/v1/adapters/mine", params={"version": 1}).content == FILES["alice"]
        assert http.get("/v1/adapters/mine", params={"version": 2**70}).status_code == 400
        assert http.post("/v1/adapters/mine/rollback", json={"version": 1}).json()["version"] == 3
        assert says() == greedy("alice", [7, 8])
        assert [v["version"] for v in http.get("/v1/adapters/mine/versions").json()["data"]] == [
            3,
            2,
            1,
        ]
        assert [e["id"] for e in http.get("/v1/adapters").json()["data"]] == ["alice", "mine"]
        assert http.post("/v1/load_lora_adapter", json={"lora_name": "mine"}).status_code == 200
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 200
        assert (
            http.post(
                "/v1/load_lora_adapter", json={"lora_name": "mine", "lora_path": "/etc/passwd"}
            ).status_code
            == 400
        )
        assert http.delete("/v1/adapters/mine").json()["deleted"]
        with pytest.raises(openai.NotFoundError):
            says()
        assert http.get("/v1/adapters/mine").status_code == 404
        assert http.delete("/v1/adapters/mine").status_code == 404


def test_keys_come_and_go_while_the_server_runs(served, tmp_path, caplog):
    keys, before = Keys(served.keys.path), served.keys.path.read_bytes()
    with served.http() as http:

        def status(key):
            return http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

        new = keys.add(("cid",))
        assert (status(new), status(served.key["ann"])) == (200, 200)
        assert keys.revoke(new) == Caller(("cid",))
        assert (status(new), status(served.key["ann"])) == (401, 200)
        served.keys.path.write_text("[{")
        assert (status(new), status(served.key["ann"])) == (401, 200)
        assert "no list of keys" in caplog.text
        served.keys.path.write_bytes(before)
        assert (status(new), status(served.key["ann"])) == (401, 200)


def test_nothing_of_one_tenant_is_for_another(served):
    talk = [{"role": "user", "content": "hi"}]
    with served.http("ben") as ben, served.openai("ben") as client, served.http("both") as both:
        answers = {}
        for model in ("alice", "ann/alice", "ann/nobody", "nobody", "ann/../alice", "a b"):
            with pytest.raises(openai.NotFoundError) as caught:
                client.chat.completions.create(model=model, messages=talk)
            answers[model] = caught.value.body["message"].replace(model, "X")
        assert len({re.sub("'.*'", "", text) for text in answers.values()}) == 1
        assert [m.id for m in client.models.list()] == ["base", "bob"]
        foreign = [
            ben.get("/v1/adapters/alice", params={"tenant": "ann"}),
            ben.get("/v1/adapters/ghost", params={"tenant": "ann"}),
        ]
        assert [r.status_code for r in foreign] == [404, 404]
        assert foreign[0].content == foreign[1].content
        for call in (ben.delete, ben.get):
            assert call("/v1/adapters/alice", params={"tenant": "ann"}).status_code == 404
        assert (
            ben.put("/v1/adapters/x", params={"tenant": "ann"}, content=FILES["bob"]).status_code
            == 404
        )
        assert (
            ben.post(
                "/v1/adapters/alice/rollback", params={"tenant": "ann"}, json={"version": 1}
            ).status_code
            == 404
        )
        assert ben.get("/v1/adapters").json()["data"][0]["id"] == "bob"
        assert [m["id"] for m in both.get("/v1/models").json()["data"]] == [
            "base",
            "alice",
            "ben/bob",
        ]
        assert (
            both.post(
                "/v1/completions", json={"model": "ben/bob", "prompt": [4], "max_tokens": 1}
            ).status_code
            == 200
        )
        page = both.get("/v1/models", params={"limit": 1}).json()
        assert [m["id"] for m in page["data"]] == ["base", "alice"]
        assert [
            m["id"] for m in both.get("/v1/models", params={"after": "alice"}).json()["data"]
        ] == ["ben/bob"]


def test_the_same_work_is_done_for_what_is_not_there_and_for_what_is_anothers(served, monkeypatch):
    asked = []
    newest = served.store.newest
    monkeypatch.setattr(
        served.store,
        "newest",
        lambda tenant, name: asked.append((tenant, name)) or newest(tenant, name),
    )
    work = {}
    for model in ("ann/alice", "ann/ghost", "ghost", "bob"):
        asked.clear()
        with contextlib.suppress(AdapterNotFoundError):
            served.service.find_adapter(Caller(("ben",)), model)
        work[model] = list(asked)
    assert work == {model: [("ben", model.rpartition("/")[2])] for model in work}


def poisoned():
    good = FILES["alice"]
    own = ADAPTERS["alice"]
    nan = {k: v.clone() for k, v in own.b.items()}
    next(iter(nan.values()))[0] = float("nan")
    import safetensors.torch

    tensors = safetensors.torch.load(good)
    return {
        "empty": b"", "text": b"hello", "cut off": good[:-10], "huge header": (2**62).to_bytes(8, "little") + b"{}", "changed": good[:-1] + bytes([good[-1] ^ 1]),
        "no metadata": safetensors.torch.save(tensors), "another base": native.encode(adapter(fakes.bert, QV, 0)),
    }  # fmt: skip


@pytest.mark.parametrize("what", poisoned())
def test_a_poisoned_adapter_is_refused_and_nothing_is_stored(served, what):
    with served.http() as http:
        reply = http.put("/v1/adapters/poison", content=poisoned()[what])
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["message"]
        assert http.get("/v1/adapters/poison").status_code == 404


def test_limits_on_sizes_and_names(served):
    with served.http() as http:
        assert http.put("/v1/adapters/large", content=bytes(200_001)).status_code == 413
        assert (
            http.put("/v1/adapters/large", content=(bytes(50_000) for _ in range(5))).status_code
            == 413
        )
        assert (
            http.post("/v1/completions", json={"model": "base", "prompt": "x" * 30_000}).status_code
            == 413
        )
        assert http.put("/v1/adapters/.hidden", content=FILES["alice"]).status_code == 400
        assert http.put("/v1/adapters/..%2F..%2Fx", content=FILES["alice"]).status_code in (
            400,
            404,
        )
        assert http.post("/v1/completions", content=b"{").status_code == 400
        assert http.get("/v1/nothing").status_code == 404


def test_what_prometheus_and_a_balancer_ask_for(served):
    with served.http() as http:
        assert (
            http.post(
                "/v1/completions", json={"model": "base", "prompt": [9], "max_tokens": 1}
            ).status_code
            == 200
        )
    with httpx.Client(base_url=served.url) as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/ready").json() == {"status": "ready"}
        text = http.get("/metrics").text
    for name in (
        "adapters_loaded",
        'adapters_capacity{base="base"} 4.0',
        "generation_tokens_total",
        'requests_total{base="base",how="length"}',
        "step_seconds_total",
        "frozen_bytes",
    ):
        assert f"veratune_{name}" in text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(served, stream):
    body = {
        "model": "alice",
        "prompt": [4, 5],
        "max_tokens": 120,
        "temperature": 1.0,
        "stream": stream,
    }
    before = served.engine.stats.finished["cancelled"]
    with served.slow(0.2), served.http() as http:  # answers of 24 seconds
        if stream:
            for _ in range(3):
                with http.stream("POST", "/v1/completions", json=body) as reply:
                    next(reply.iter_lines())
        else:
            for _ in range(3):
                with pytest.raises(httpx.TimeoutException):
                    http.post("/v1/completions", json=body, timeout=0.5)
        served.until_idle()
    assert served.engine.stats.finished["cancelled"] == before + 3
    assert served.engine.pool.pinned == 0


def test_too_many_requests_are_told_to_come_again(tmp_path):
    served = RunningServer(tmp_path, config=SchedulerConfig(max_num_seqs=1, max_queue=1))
    replies = []

    def ask():
        with served.http() as http:
            replies.append(
                http.post("/v1/completions", json={"model": "base", "prompt": [4], "max_tokens": 9})
            )

    threads = [threading.Thread(target=ask) for _ in range(8)]
    try:
        with served.held():
            for thread in threads:
                thread.start()
            end = time.time() + 20
            while len(replies) < 7 and time.time() < end:
                time.sleep(0.02)
        for thread in threads:
            thread.join()
        assert [reply.status_code for reply in replies] == 7 * [429] + [200]
        assert replies[0].headers["Retry-After"] == "1"
        assert replies[0].json()["error"]["code"] == "rate_limit_exceeded"
    finally:
        served.stop()


def test_a_server_without_keys_listens_on_this_machine_only(tmp_path):
    keys = Keys(tmp_path / "k.json")
    keys.add(("ann",))
    check_address("127.0.0.1", Keys(None))
    check_address("0.0.0.0", keys)
    with pytest.raises(UnsupportedError, match="without keys listens on 127.0.0.1 only"):
        check_address("0.0.0.0", Keys(None))


def test_embeddings_and_classes_come_from_the_encoder(tmp_path):
    """Beside a causal model: the openai client's embeddings, classes with names, and each base model for what it does."""
    served = RunningServer(tmp_path, with_encoder=True)
    try:
        headed = dataclasses.replace(
            headed_adapter(HEADED, 1),
            task={"name": "text-classification", "labels": ["bad", "good"]},
        )
        with served.http() as http, served.openai() as client:
            assert http.put("/v1/adapters/taste", content=native.encode(headed)).status_code == 201
            assert (
                http.put(
                    "/v1/adapters/three", content=native.encode(headed_adapter(HEADED, 3, labels=3))
                ).status_code
                == 201
            )
            assert http.put("/v1/adapters/alice", content=FILES["alice"]).status_code == 201
            assert [m.id for m in client.models.list()] == [
                "base",
                "reader",
                "alice",
                "taste",
                "three",
            ]
            texts = ["a great film", "awful"]
            for model, own in (("reader", None), ("taste", headed)):
                found = client.embeddings.create(model=model, input=texts)
                for text, entry in zip(texts, found.data, strict=True):
                    assert torch.allclose(
                        torch.tensor(entry.embedding),
                        encode_alone(own, text, "embedding"),
                        atol=1e-5,
                    )
            plain = client.embeddings.create(
                model="reader", input=[4, 5, 6], encoding_format="float"
            )
            assert len(plain.data) == 1
            assert len(plain.data[0].embedding) == 32
            many = client.embeddings.create(
                model="reader", input=["light"] * 40
            )  # more than there are rows
            assert [entry.index for entry in many.data] == list(range(40))
            reply = http.post("/v1/classify", json={"model": "taste", "input": texts}).json()
            for text, entry in zip(texts, reply["data"], strict=True):
                logits = encode_alone(headed, text, "logits")
                assert torch.allclose(torch.tensor(entry["probs"]), logits.softmax(-1), atol=1e-5)
                assert entry["label"] == ["bad", "good"][int(logits.argmax())]
            three = http.post(
                "/v1/classify", json={"model": "three", "input": "light", "pair": "please"}
            ).json()
            assert three["data"][0]["num_classes"] == 3
            for body, why in (
                ({"model": "reader", "input": "x"}, "no trained head"), ({"model": "taste", "input": []}, "0 texts"),
                ({"model": "taste", "input": ["x"], "pair": ["a", "b"]}, "2 texts for 1"), ({"model": "alice", "input": "x"}, "another base model"),
            ):  # fmt: skip
                refused = http.post("/v1/classify", json=body)
                assert refused.status_code == 400
                assert why in refused.json()["error"]["message"]
            with pytest.raises(openai.BadRequestError, match="'base' generates, and nothing else"):
                client.embeddings.create(model="base", input="x")
            with pytest.raises(openai.BadRequestError, match=r"'reader' reads texts"):
                client.completions.create(model="reader", prompt="x")
            with pytest.raises(openai.BadRequestError, match="another base model"):
                client.completions.create(model="taste", prompt="x")
            with pytest.raises(openai.BadRequestError, match="embeddings have 32"):
                client.embeddings.create(model="reader", input="x", dimensions=16)
            assert client.completions.create(
                model="alice", prompt=[4, 5], max_tokens=2, temperature=0
            ).usage.completion_tokens
    finally:
        served.stop()


def test_a_server_without_an_encoder_says_so(served):
    with served.openai() as client, pytest.raises(openai.BadRequestError, match="no encoder"):
        client.embeddings.create(model="base", input="x")
    with served.http() as http:
        assert "does not fine-tune" in http.get("/v1/fine_tuning/jobs").json()["error"]["message"]
