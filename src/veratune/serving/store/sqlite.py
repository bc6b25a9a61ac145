"""SqliteStore: adapters in one SQLite file on this machine."""

import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from veratune.errors import AdapterFileError, AdapterNotFoundError
from veratune.serving.sqlite_pool import ConnectionPool
from veratune.serving.store.base import Entry, Store, Version, check_name, check_names

_SCHEMA = """
CREATE TABLE IF NOT EXISTS versions (
    tenant TEXT NOT NULL, name TEXT NOT NULL, number INTEGER NOT NULL, size INTEGER NOT NULL,
    created REAL NOT NULL, data BLOB, PRIMARY KEY (tenant, name, number));
CREATE TABLE IF NOT EXISTS newest (
    tenant TEXT NOT NULL, name TEXT NOT NULL, number INTEGER NOT NULL, size INTEGER NOT NULL,
    created REAL NOT NULL, PRIMARY KEY (tenant, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS embeddings (
    tenant TEXT NOT NULL, name TEXT NOT NULL, tag TEXT NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (tenant, name));
"""
MIN_FREE = 64 * 2**20  # bytes; with less, the next upload or checkpoint may fail


class SqliteStore(Store):
    """Adapters in one SQLite file in write-ahead mode."""

    def __init__(self, path: str | Path, lock_timeout: float = 5.0) -> None:
        """Open the file, or create it.

        Args:
            path: The file.
            lock_timeout: Seconds that a call waits for a locked file before StoreError.

        Raises:
            StoreError: The file cannot be opened as a store of adapters.
        """
        self.path = Path(path)
        self._db = ConnectionPool(self.path, timeout=lock_timeout)
        self._db.create(_SCHEMA, self.path, "a store of adapters")

    def put(self, tenant: str, name: str, data: bytes) -> Version:
        if not data:
            raise AdapterFileError(f"adapter {name!r} of {tenant!r} has no bytes")
        return self._append(tenant, name, data)

    def newest(self, tenant: str, name: str) -> Version:
        check_names(tenant, name)
        rows = self._db.query(
            "SELECT number, size, created FROM newest WHERE tenant = ? AND name = ?",
            (tenant, name),
        )
        if not rows or not rows[0]["size"]:
            raise AdapterNotFoundError(f"no adapter {name!r}")
        return Version(*rows[0])

    def get(self, tenant: str, name: str, number: int) -> bytes:
        check_names(tenant, name)
        rows = self._db.query(
            "SELECT data FROM versions WHERE tenant = ? AND name = ? AND number = ?",
            (tenant, name, number),
        )
        if not rows or rows[0]["data"] is None:
            raise AdapterNotFoundError(f"no version {number} of adapter {name!r}")
        return bytes(rows[0]["data"])

    def versions(self, tenant: str, name: str) -> list[Version]:
        check_names(tenant, name)
        rows = self._db.query(
            "SELECT number, size, created FROM versions WHERE tenant = ? AND name = ? "
            "ORDER BY number DESC",
            (tenant, name),
        )
        if not rows:
            raise AdapterNotFoundError(f"no adapter {name!r}")
        return [Version(*row) for row in rows]

    def delete(self, tenant: str, name: str) -> Version:
        self.newest(tenant, name)
        return self._append(tenant, name, None)

    def list_adapters(self, tenant: str, after: str = "", limit: int = 100) -> list[Entry]:
        check_name("tenant", tenant)
        rows = self._db.query(
            "SELECT name, number, size, created FROM newest "
            "WHERE tenant = ? AND name > ? AND size > 0 ORDER BY name LIMIT ?",
            (tenant, after, limit),
        )
        return [Entry(name, Version(*rest)) for name, *rest in rows]

    def put_embedding(self, tenant: str, name: str, data: bytes) -> None:
        check_names(tenant, name)
        with self._db.write() as db:
            row = db.execute(
                "SELECT size FROM newest WHERE tenant = ? AND name = ?", (tenant, name)
            ).fetchone()
            if row is None or not row["size"]:
                raise AdapterNotFoundError(f"no adapter {name!r}")
            values = (tenant, name, secrets.token_hex(8), data)
            db.execute("INSERT OR REPLACE INTO embeddings VALUES (?, ?, ?, ?)", values)

    def list_embeddings(self, tenant: str) -> Mapping[str, str]:
        check_name("tenant", tenant)
        sql = "SELECT name, tag FROM embeddings WHERE tenant = ?"
        return {row["name"]: row["tag"] for row in self._db.query(sql, (tenant,))}

    def get_embeddings(self, tenant: str, names: Iterable[str]) -> Mapping[str, bytes]:
        check_name("tenant", tenant)
        sql = "SELECT data FROM embeddings WHERE tenant = ? AND name = ?"
        found = {}
        with self._db.read() as db:
            for name in names:
                row = db.execute(sql, (tenant, name)).fetchone()
                if row is not None:
                    found[name] = bytes(row["data"])
        return found

    def problem(self) -> str | None:
        super().problem()
        return free_space_problem(self.path.parent, "adapters")

    def scrub(self) -> None:
        self._db.scrub()

    def close(self) -> None:
        self._db.close()

    def insert(self, tenant: str, name: str, version: Version, data: bytes) -> None:
        """Store a version under another store's number, as a cache does."""
        self.insert_many([(tenant, name, version, data)])

    def insert_many(self, rows: Iterable[tuple[str, str, Version, bytes]]) -> None:
        """Store (tenant, adapter name, version, bytes) of many versions in one transaction."""
        with self._db.write() as db:
            for tenant, name, version, data in rows:
                check_names(tenant, name)
                _insert(db, tenant, name, version, data)

    def evict(self, limit: int) -> int:
        """Remove the oldest versions until all together have at most `limit` bytes.

        Returns:
            How many versions were removed.
        """
        with self._db.write() as db:
            total = db.execute("SELECT coalesce(sum(size), 0) FROM versions").fetchone()[0]
            removed = 0
            rows = db.execute("SELECT rowid, size FROM versions ORDER BY rowid").fetchall()
            for rowid, size in rows:
                if total <= limit:
                    break
                db.execute("DELETE FROM versions WHERE rowid = ?", (rowid,))
                total, removed = total - size, removed + 1
        return removed

    def _append(self, tenant: str, name: str, data: bytes | None) -> Version:
        check_names(tenant, name)
        with self._db.write() as db:
            row = db.execute(
                "SELECT number FROM newest WHERE tenant = ? AND name = ?", (tenant, name)
            ).fetchone()
            version = Version((row["number"] if row else 0) + 1, len(data or b""), time.time())
            if data is None:
                db.execute(
                    "UPDATE versions SET data = NULL WHERE tenant = ? AND name = ?", (tenant, name)
                )
                db.execute("DELETE FROM embeddings WHERE tenant = ? AND name = ?", (tenant, name))
            _insert(db, tenant, name, version, data)
        return version


def free_space_problem(folder: Path, what: str) -> str | None:
    """A sentence if the disk below `folder` is nearly full; None otherwise."""
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE:
        return f"the disk for {what} has {free / 2**20:.0f} MiB left; free at least 64 MiB"
    return None


def _insert(
    db: sqlite3.Connection, tenant: str, name: str, version: Version, data: bytes | None
) -> None:
    values = (tenant, name, version.number, version.size, version.created)
    db.execute("INSERT OR REPLACE INTO versions VALUES (?, ?, ?, ?, ?, ?)", (*values, data))
    db.execute("INSERT OR REPLACE INTO newest VALUES (?, ?, ?, ?, ?)", values)
