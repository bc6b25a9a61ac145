"""Every store keeps what it acknowledged, gives every version a number of its own, and answers as a dictionary would."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from obstore.store import LocalStore, MemoryStore

from veratune.errors import AdapterFileError, AdapterNotFoundError, InvalidNameError, StoreError
from veratune.serving.store.cached import CachedStore
from veratune.serving.store.object import ObjectStore
from veratune.serving.store.sqlite import SqliteStore

KINDS = ("sqlite", "memory", "folder", "cached")


@pytest.fixture(params=KINDS)
def store(request, tmp_path):
    found = make(request.param, tmp_path)
    yield found
    found.close()


def make(kind, path):
    if kind == "sqlite":
        return SqliteStore(path / "adapters.db")
    if kind == "memory":
        return ObjectStore(MemoryStore())
    if kind == "folder":
        (path / "bucket").mkdir()
        return ObjectStore(LocalStore(path / "bucket"))
    return CachedStore(
        ObjectStore(MemoryStore()), SqliteStore(path / "cache.db"), refresh_seconds=60
    )


def test_it_answers_as_a_dictionary_of_histories_would(store):
    """Random puts, deletes and rolls back, and after each every answer."""
    rng = random.Random(0)
    known = {}
    for step in range(60):
        tenant, name = rng.choice("ab"), rng.choice(("x", "y-1"))
        history = known.setdefault((tenant, name), [])
        what = rng.choice(("put", "put", "delete", "back"))
        if what == "put":
            history.append(f"bytes {step}".encode())
            assert store.put(tenant, name, history[-1]).number == len(history)
        elif what == "delete":
            if history and history[-1]:
                history[:] = [None] * (len(history) + 1)
                assert store.delete(tenant, name).number == len(history)
            else:
                with pytest.raises(AdapterNotFoundError, match=f"no adapter '{name}'"):
                    store.delete(tenant, name)
        else:
            number = rng.randint(1, len(history) + 1)
            if number <= len(history) and history[number - 1]:
                history.append(history[number - 1])
                assert store.roll_back(tenant, name, number).number == len(history)
            else:
                with pytest.raises(AdapterNotFoundError, match=f"no version {number} of"):
                    store.roll_back(tenant, name, number)
        for (owner, own), versions in known.items():
            if versions and versions[-1]:
                newest = store.newest(owner, own)
                assert (newest.number, newest.size) == (len(versions), len(versions[-1]))
                assert abs(newest.created - time.time()) < 60
            else:
                with pytest.raises(AdapterNotFoundError):
                    store.newest(owner, own)
            for i, data in enumerate(versions):
                if data:
                    assert store.get(owner, own, i + 1) == data
                else:
                    with pytest.raises(AdapterNotFoundError):
                        store.get(owner, own, i + 1)
            if versions:
                assert store.versions(owner, own)[0].number == len(versions)
        for owner in "ab":
            alive = sorted(
                own
                for (tenant_, own), versions in known.items()
                if tenant_ == owner and versions and versions[-1]
            )
            assert [entry.name for entry in store.list_adapters(owner)] == alive


def test_lists_are_paged(store):
    for i in range(7):
        store.put("a", f"n{i}", b"x")
    store.delete("a", "n3")
    first = store.list_adapters("a", limit=4)
    assert [entry.name for entry in first] == ["n0", "n1", "n2", "n4"]
    assert [entry.name for entry in store.list_adapters("a", after=first[-1].name)] == ["n5", "n6"]
    assert store.list_adapters("b") == []


def test_embeddings_come_and_go_with_their_adapters(store):
    with pytest.raises(AdapterNotFoundError, match="no adapter 'x'"):
        store.put_embedding("a", "x", b"1")
    for tenant, name in (("a", "x"), ("a", "y"), ("b", "x")):
        store.put(tenant, name, b"adapter")
        store.put_embedding(tenant, name, f"{tenant}{name}".encode())
    first = store.list_embeddings("a")
    assert set(first) == {"x", "y"}
    assert store.get_embeddings("a", ["x", "y", "z"]) == {"x": b"ax", "y": b"ay"}
    assert store.list_embeddings("c") == {}
    time.sleep(0.01)  # a file's tag is its time
    store.put("a", "x", b"new")
    assert store.list_embeddings("a") == first
    store.put_embedding("a", "x", b"other")
    second = store.list_embeddings("a")
    assert (second["x"] != first["x"], second["y"]) == (True, first["y"])
    assert store.get_embeddings("a", ["x"]) == {"x": b"other"}
    store.delete("a", "x")
    store.put("a", "x", b"again")
    assert set(store.list_embeddings("a")) == {"y"}
    assert store.get_embeddings("a", ["x"]) == {}
    assert store.get_embeddings("b", ["x"]) == {"x": b"bx"}
    assert [entry.name for entry in store.list_adapters("a")] == ["x", "y"]


def test_threads_that_put_at_once_get_a_version_each(store):
    found, lock = [], threading.Lock()

    def work(i):
        for k in range(5):
            version = store.put("a", "x", f"{i} {k}".encode())
            with lock:
                found.append((version.number, f"{i} {k}".encode()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for number, _ in found) == list(range(1, 21))
    assert all(store.get("a", "x", number) == data for number, data in found)


@pytest.mark.parametrize(
    "name", ["", "a/b", "../x", ".hidden", "a b", "a\n", "ä", "x" * 129, "a\0"]
)
def test_names_that_could_mean_something_else_are_refused(store, name):
    with pytest.raises(InvalidNameError, match="cannot be used: 1 to 128 letters"):
        store.put("a", name, b"x")
    with pytest.raises(InvalidNameError, match="cannot be used"):
        store.put(name, "x", b"x")
    with pytest.raises(InvalidNameError, match="cannot be used"):
        store.list_adapters(name)


def test_mistakes(store, tmp_path):
    with pytest.raises(AdapterFileError, match="has no bytes"):
        store.put("a", "x", b"")
    with pytest.raises(AdapterNotFoundError, match="no adapter 'x'"):
        store.versions("a", "x")
    (tmp_path / "broken.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(StoreError, match="cannot be opened as a store"):
        SqliteStore(tmp_path / "broken.db")
    with pytest.raises(StoreError, match="no object store"):
        ObjectStore.from_url("nonsense://bucket")


def test_a_cache_asks_for_bytes_once_and_for_the_newest_version_now_and_then(tmp_path):
    asked = []

    class Told(ObjectStore):
        def get(self, *words):
            asked.append(words)
            return super().get(*words)

    bucket = MemoryStore()
    here = CachedStore(Told(bucket), SqliteStore(tmp_path / "c.db"), refresh_seconds=0.05)
    elsewhere = ObjectStore(bucket)
    elsewhere.put("a", "x", b"one")
    assert here.newest("a", "x").number == 1
    assert here.get("a", "x", 1) == here.get("a", "x", 1) == b"one"
    assert asked == [("a", "x", 1)]
    elsewhere.put("a", "x", b"two")
    time.sleep(0.06)
    assert here.newest("a", "x").number == 2
    elsewhere.delete("a", "x")
    time.sleep(0.06)
    with pytest.raises(AdapterNotFoundError):
        here.newest("a", "x")
    with pytest.raises(AdapterNotFoundError):
        here.roll_back("a", "x", 1)
    here.close()


def test_a_full_cache_forgets_what_came_first(tmp_path):
    store = CachedStore(ObjectStore(MemoryStore()), SqliteStore(tmp_path / "c.db"), limit=1000)
    for i in range(30):
        store.put("a", f"n{i}", bytes(100))
    assert store.cache.evict(1000) <= 2
    assert store.get("a", "n0", 1) == bytes(100)  # from the origin
    with pytest.raises(AdapterNotFoundError):
        store.cache.get("a", "n1", 1)
    store.close()


WRITER = """
import sys
from pathlib import Path
from veratune.serving.store.object import ObjectStore
from veratune.serving.store.sqlite import SqliteStore
from obstore.store import LocalStore
path = Path(sys.argv[2])
store = SqliteStore(path / "a.db") if sys.argv[1] == "sqlite" else ObjectStore(LocalStore(path, mkdir=True))
i = int(sys.argv[3])
while True:
    store.put("a", f"n{i % 7}", str(i).encode() * 20_000)
    print(i, flush=True)
    i += 1
"""


def killed_under_writes(kind, path, times):
    at, acknowledged = 0, []
    for _ in range(times):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, kind, str(path), str(at)],
            stdout=subprocess.PIPE,
            text=True,
        )
        lines = [writer.stdout.readline()]
        time.sleep(random.random() * 0.05)
        os.kill(writer.pid, signal.SIGKILL)
        lines += writer.stdout.read().splitlines()
        writer.wait()
        writer.stdout.close()
        acknowledged += [int(line) for line in lines if line.strip()]
        at = acknowledged[-1] + 2  # the one in flight may be there or not
    store = SqliteStore(path / "a.db") if kind == "sqlite" else ObjectStore(LocalStore(path))
    stored = set()
    for name in (f"n{k}" for k in range(7)):
        for version in store.versions("a", name):
            data = store.get("a", name, version.number)
            text = data[: len(data) // 20_000].decode()
            assert data == text.encode() * 20_000  # nothing torn
            stored.add(int(text))
    store.close()
    return set(acknowledged), stored


@pytest.mark.parametrize("kind", ["sqlite", "folder"])
def test_nothing_that_was_acknowledged_is_lost_when_the_process_is_killed(kind, tmp_path):
    acknowledged, stored = killed_under_writes(kind, tmp_path, 3)
    assert acknowledged
    assert acknowledged <= stored


@pytest.mark.slow
def test_nothing_is_lost_in_fifty_kills(tmp_path):
    acknowledged, stored = killed_under_writes("sqlite", Path(tmp_path), 50)
    assert len(acknowledged) >= 50
    assert acknowledged <= stored
