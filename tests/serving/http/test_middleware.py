"""Bodies are bounded in size and time, keys are checked first, and pages of other sites are refused."""

import socket
import time

import httpx2 as httpx
import pytest

from tests.serving.http.fakes import FILES, RunningServer

TALK = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    server = RunningServer(
        tmp_path_factory.mktemp("keyed"),
        body_limit=20_000,
        body_timeout=1.0,
        max_requests_per_minute=500,
    )
    yield server
    server.stop()


@pytest.fixture(scope="module")
def keyless(tmp_path_factory):
    server = RunningServer(
        tmp_path_factory.mktemp("keyless"),
        open=True,
        cors_origins=("https://app.example.com",),
        metrics=False,
        openapi=False,
    )
    yield server
    server.stop()


def raw(server, head, timeout=10):
    """The first line that the server answers to a request's head, without any body."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=timeout) as connection:
        connection.sendall(head.encode())
        return connection.recv(4096).decode().partition("\r\n")[0]


@pytest.mark.parametrize(
    "call", ["POST /v1/files", "PUT /v1/adapters/x", "POST /v1/chat/completions"]
)
def test_a_key_is_checked_before_the_body_is_read(keyed, call):
    head = f"{call} HTTP/1.1\r\nHost: x\r\nContent-Length: 10000\r\n\r\n"
    assert raw(keyed, head) == "HTTP/1.1 401 Unauthorized"


def test_a_streamed_body_over_the_limit_is_413(keyed):
    with keyed.http() as http:
        chunks = (b" " * 5000 for _ in range(10))
        reply = http.post("/v1/chat/completions", content=chunks)
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "body_too_large"


def test_a_body_that_comes_too_slowly_is_408(keyed):
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
        f"Authorization: Bearer {keyed.key['ann']}\r\n\r\n"
    )
    assert raw(keyed, head) == "HTTP/1.1 408 Request Timeout"


def test_unknown_keys_are_throttled_and_known_ones_are_not(tmp_path):
    server = RunningServer(tmp_path)
    try:
        with server.http() as http:
            wrong = {"Authorization": "Bearer wrong"}
            codes = [http.get("/v1/models", headers=wrong).status_code for _ in range(40)]
            assert set(codes[:30]) == {401}
            assert codes[-1] == 429
            assert int(http.get("/v1/models", headers=wrong).headers["Retry-After"]) >= 1
            assert http.get("/v1/models").status_code == 200
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": "evil.example"}, 400),
        ({"Host": "127.0.0.1.evil.example"}, 400),
        ({"Origin": "https://app.example.com"}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Host": "localhost:8000"}, 200),
        ({}, 200),
    ],
)
def test_a_server_without_keys_answers_its_own_pages_only(keyless, headers, status):
    with httpx.Client(base_url=keyless.url, timeout=30) as http:
        assert http.post("/v1/chat/completions", json=TALK, headers=headers).status_code == status


def test_its_own_page_may_call_it(keyless):
    with httpx.Client(base_url=keyless.url, timeout=30) as http:
        own = http.post("/v1/chat/completions", json=TALK, headers={"Origin": keyless.url})
        upload = {"Origin": "https://evil.example"}
        foreign = http.post("/v1/files", files={"file": b"x"}, headers=upload)
    assert (own.status_code, foreign.status_code) == (200, 403)


def test_allowed_origins_get_cors_headers(keyless):
    origin = {"Origin": "https://app.example.com", "Access-Control-Request-Method": "POST"}
    with httpx.Client(base_url=keyless.url) as http:
        reply = http.options("/v1/chat/completions", headers=origin)
    assert reply.headers["access-control-allow-origin"] == "https://app.example.com"


def test_metrics_and_the_description_can_be_switched_off(keyless, keyed):
    with httpx.Client() as http:
        for path in ("/metrics", "/openapi.json"):
            assert http.get(keyless.url + path).status_code == 404
            assert http.get(keyed.url + path).status_code == 200


def test_requests_and_tokens_of_a_tenant_are_limited(tmp_path, monkeypatch):
    clock, early = time.time, 10 - time.time() % 60  # ten seconds into the limiter's minute
    monkeypatch.setattr(time, "time", lambda: clock() + early)
    server = RunningServer(tmp_path, max_requests_per_minute=6, max_tokens_per_minute=50)
    body = {"model": "base", "prompt": [4, 5], "max_tokens": 18}
    try:
        with server.http("ann") as ann, server.http("ben") as ben:
            assert ann.post("/v1/completions", json=body).status_code == 200
            assert ann.post("/v1/completions", json=body).status_code == 200
            refused = ann.post("/v1/completions", json=body)
            assert (refused.status_code, int(refused.headers["Retry-After"]) > 1) == (429, True)
            assert "50 tokens a minute" in refused.json()["error"]["message"]
            never = ann.post("/v1/completions", json=body | {"max_tokens": 60})
            assert (never.status_code, "lower max_tokens" in never.text) == (400, True)
            codes = [ann.get("/v1/models").status_code for _ in range(5)]
            assert codes[-1] == 429
            assert ben.post("/v1/completions", json=body).status_code == 200
    finally:
        server.stop()


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(tmp_path, monkeypatch):
    server = RunningServer(tmp_path)
    tokenized = []
    encode = type(server.engine.tokenizer).__call__

    def counted(tokenizer, text, *words, **options):
        tokenized.append(len(text))
        return encode(tokenizer, text, *words, **options)

    monkeypatch.setattr(type(server.engine.tokenizer), "__call__", counted)
    long = "light " * 500_000
    try:
        with server.http() as http:
            bodies = (
                ("completions", {"model": "base", "prompt": long}),
                ("completions", {"model": "base", "prompt": ["x", long]}),
                ("chat/completions", TALK | {"messages": [{"role": "user", "content": long}]}),
            )
            for call, body in bodies:
                reply = http.post(f"/v1/{call}", json=body)
                error = reply.json()["error"]
                assert (reply.status_code, error["code"]) == (400, "context_length_exceeded")
                assert error["param"] == ("messages" if "messages" in body else "prompt")
    finally:
        server.stop()
    assert max(tokenized, default=0) < 100


def test_unknown_fields_are_ignored_with_one_log_line_each(keyed, caplog):
    caplog.set_level("INFO", "veratune")
    with keyed.http() as http:
        for _ in range(3):
            body = TALK | {"store": True, "made_up": {"a": "b"}, "of_tomorrow": "auto"}
            assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert caplog.text.count("'made_up' is ignored") == 1
    assert caplog.text.count("'of_tomorrow' is ignored") == 1


def test_an_adapter_that_is_sent_slowly_but_in_time_is_taken(keyed):
    def pieces():
        for start in range(0, len(FILES["alice"]), 4096):
            time.sleep(0.001)
            yield FILES["alice"][start : start + 4096]

    with keyed.http() as http:
        assert http.put("/v1/adapters/slow", content=pieces()).status_code == 201
