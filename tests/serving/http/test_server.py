"""The socket sends without delay, silent clients are closed, and SIGTERM lets running requests finish."""

import socket
import threading
import time

import httpx2 as httpx
import pytest

from tests.serving.http.fakes import RunningServer
from veratune.errors import ConfigError
from veratune.serving.http.server import bind


@pytest.fixture
def server(tmp_path):
    made = RunningServer(tmp_path, header_timeout=0.5)
    yield made
    made.stop()


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_connections_send_without_delay(server):
    """asyncio sets TCP_NODELAY only on sockets that name their protocol."""
    with bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
    with server.http() as http:
        assert http.get("/health").status_code == 200
        connections = list(server.server.server_state.connections)
        assert connections
        accepted = connections[0].transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_client_that_sends_no_whole_headers_is_closed(server):
    with connect(server) as silent, connect(server) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: ")
        assert silent.recv(100) == b""
        assert slow.recv(100) == b""
    with server.http() as http:
        assert http.get("/health").status_code == 200


def test_a_connection_that_is_used_is_not_closed(server):
    with server.slow(0.1), server.http() as http:
        for _ in range(2):
            body = {"model": "base", "prompt": [4, 5], "max_tokens": 10}
            assert http.post("/v1/completions", json=body).status_code == 200


def test_a_signal_drains(server):
    """Running requests finish, new ones and readiness get 503 on the open port, then it closes."""
    replies = []
    body = {"model": "base", "prompt": [4, 5], "max_tokens": 30}

    def ask():
        with server.http() as http:
            replies.append(http.post("/v1/completions", json=body))

    asking = threading.Thread(target=ask)
    with server.slow(0.05), server.http() as http:
        asking.start()
        while not server.engine.scheduler.running:
            time.sleep(0.01)
        server.server.handle_exit(15, None)
        assert http.get("/health").status_code == 200
        ready = http.get("/ready")
        refused = http.post("/v1/completions", json=body)
        asking.join()
    assert (ready.status_code, refused.status_code) == (503, 503)
    assert refused.headers["Retry-After"] == "1"
    assert replies[0].json()["usage"]["completion_tokens"] == 30
    server.thread.join(20)
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


def test_requests_that_outlast_the_drain_are_answered_with_503(server):
    """Whole and streamed completions end with the reason, and the server ends without an error."""
    server.server.shutdown_timeout = 0.2
    body = {"model": "base", "prompt": [4, 5], "max_tokens": 100}
    replies = []

    def ask(stream):
        with server.http() as http:
            replies.append(http.post("/v1/completions", json={**body, "stream": stream}))

    asking = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    with server.slow(0.2):
        for thread in asking:
            thread.start()
        while server.engine.scheduler.running < len(asking):
            time.sleep(0.01)
        server.server.handle_exit(15, None)
        for thread in asking:
            thread.join()
    replies.sort(key=lambda reply: -reply.status_code)
    assert [reply.status_code for reply in replies] == [503, 200]
    assert all("went down before the answer was whole" in reply.text for reply in replies)
    server.thread.join(20)
    assert not server.thread.is_alive()


def test_a_taken_port_is_one_line():
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 cannot be had"):
            bind("127.0.0.1", port)
