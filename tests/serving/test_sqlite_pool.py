"""The pool opens a bounded number of connections, waits no longer than its time-out, and loses no transaction."""

import os
import sqlite3
import subprocess
import sys
import threading

import pytest

from veratune.errors import StoreError
from veratune.serving.sqlite_pool import ConnectionPool
from veratune.serving.store.sqlite import SqliteStore


@pytest.fixture
def pool(tmp_path):
    made = ConnectionPool(tmp_path / "x.db", size=2, timeout=0.2)
    made.execute("CREATE TABLE t (x INTEGER)")
    yield made
    made.close()


def test_a_failed_transaction_is_rolled_back(pool):
    def fail():
        with pool.write() as db:
            db.execute("INSERT INTO t VALUES (1)")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    pool.execute("INSERT INTO t VALUES (2)")
    assert [row["x"] for row in pool.query("SELECT x FROM t")] == [2]


def test_a_thread_waits_for_a_connection_no_longer_than_the_timeout(pool):
    with pool.read(), pool.read(), pytest.raises(StoreError, match="no connection came free"):
        pool.query("SELECT 1")
    assert pool.query("SELECT x FROM t") == []


def test_readers_go_on_while_a_writer_waits_for_a_lock(pool, tmp_path):
    other = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    errors = []

    def write():
        try:
            pool.execute("INSERT INTO t VALUES (1)")
        except StoreError as error:
            errors.append(str(error))

    writers = [threading.Thread(target=write) for _ in range(6)]
    for writer in writers:
        writer.start()
    assert pool.query("SELECT x FROM t") == []
    for writer in writers:
        writer.join()
    other.execute("ROLLBACK")
    other.close()
    assert len(errors) == 6
    assert any("locked" in error for error in errors)
    pool.execute("INSERT INTO t VALUES (3)")
    assert len(pool.query("SELECT x FROM t")) == 1


def test_a_closed_pool_says_so(pool):
    pool.close()
    with pytest.raises(StoreError, match="is closed"):
        pool.query("SELECT 1")


BURSTS = """
import os, resource, sys, threading
from veratune.serving.store.sqlite import SqliteStore
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
store = SqliteStore(sys.argv[1])
store.put("a", "x", b"data")
for burst in range(6):
    threads = [threading.Thread(target=store.get, args=("a", "x", 1)) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print(len(os.listdir("/proc/self/fd")))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_bursts_of_threads_leave_no_descriptors_open(tmp_path):
    """360 threads that end, under a limit of 256 descriptors."""
    done = subprocess.run(
        [sys.executable, "-c", BURSTS, str(tmp_path / "s.db")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert int(done.stdout) < 60


def test_a_store_on_a_full_disk_says_so(tmp_path, monkeypatch):
    store = SqliteStore(tmp_path / "s.db")
    assert store.problem() is None
    monkeypatch.setattr("veratune.serving.store.sqlite.MIN_FREE", 2**62)
    assert "free at least" in store.problem()
    store.close()
