"""Two replicas behind one address: they answer alike, and the death of one loses its own answers and nothing else."""

import collections
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2 as httpx
import openai
import psutil
import pytest

from tests import fakes
from tests.serving.fakes import small_llama
from tests.serving.http.fakes import FILES

pytest.importorskip("ray")
pytestmark = pytest.mark.slow
NAMES = [f"a{i}" for i in range(6)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    path = tmp_path_factory.mktemp("cluster")
    base = fakes.folder(small_llama(), path / "tiny")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (path / "store").mkdir()
    words = [
        sys.executable, "-m", "veratune.cli.main", "serve", "--model", base, "--served-model-name", "tiny", "--store", f"file://{path / 'store'}", "--cache", str(path / "cache.db"),
        "--refresh-seconds", "0", "--port", str(port), "--replicas", "2", "--max-num-seqs", "8", "--max-loaded-adapters", "8", "--threads", "1", "--max-model-len", "128",
    ]  # fmt: skip
    env = {
        **os.environ,
        "HOME": str(path),
        "RAY_TMPDIR": "/tmp",
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # Ray writes a token below HOME
    server = subprocess.Popen(
        words, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.time() + 120
        while True:
            try:
                if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert server.poll() is None, server.stderr.read()
            assert time.time() < end, "no replica is ready"
            time.sleep(0.5)
        yield url, server
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
        server.stderr.close()


def workers():
    """The replicas' processes."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if "ray::ServeReplica:veratune:Worker" in words:
            found.append(process)
    return found


def test_a_replica_that_is_killed_loses_its_own_answers_alone(cluster):
    url, _ = cluster
    with httpx.Client(base_url=url, timeout=60) as http:
        for i, name in enumerate(NAMES):
            assert (
                http.put(
                    f"/v1/adapters/{name}", content=FILES[("alice", "bob", "new")[i % 3]]
                ).status_code
                == 201
            )
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

            def says(name):
                return (
                    client.completions.create(
                        model=name, prompt=[4, 5, 6], temperature=0, max_tokens=8
                    )
                    .choices[0]
                    .text
                )

            wanted = {name: says(name) for name in NAMES}
            assert len(set(wanted.values())) == 3
            assert [m.id for m in client.models.list()] == ["tiny", *NAMES]
            chunks = list(
                client.completions.create(
                    model="a0", prompt=[4, 5, 6], temperature=0, max_tokens=8, stream=True
                )
            )
            assert "".join(c.choices[0].text for c in chunks) == wanted["a0"]
            assert (
                http.post("/v1/completions", json={"model": "nobody", "prompt": [4]}).status_code
                == 404
            )

            ends, stop = collections.Counter(), threading.Event()

            def ask(number):
                while not stop.is_set():
                    name = NAMES[number % len(NAMES)]
                    try:
                        ends["right" if says(name) == wanted[name] else "wrong"] += 1
                    except openai.InternalServerError as error:
                        ends[error.status_code] += 1
                    except openai.OpenAIError as error:
                        ends[type(error).__name__] += 1

            threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
            for thread in threads:
                thread.start()
            time.sleep(3)
            both = workers()
            assert len(both) == 2, both
            before = ends["right"]
            assert before > 0
            both[0].kill()
            during = http.put(
                "/v1/adapters/late", content=FILES["bob"]
            )  # may fall on the one that dies: then it was not acknowledged
            time.sleep(12)
            stop.set()
            for thread in threads:
                thread.join()
            assert ends["wrong"] == 0
            assert ends["right"] > before
            assert set(ends) <= {"right", "wrong", 503}, ends
            assert (
                ends[503] <= 12 * 3
            )  # those that it was answering, and those that came before it was missed
            assert {name: says(name) for name in NAMES} == wanted
            if during.status_code == 201:
                assert says("late") == wanted["a1"]
            end = time.time() + 60
            while len(workers()) < 2 and time.time() < end:
                time.sleep(0.5)
            assert len(workers()) == 2  # another one has come
            assert {name: says(name) for name in NAMES} == wanted


def test_sigterm_ends_all_of_it(cluster):
    _, server = cluster
    server.send_signal(signal.SIGTERM)
    server.wait(90)
    assert workers() == []
