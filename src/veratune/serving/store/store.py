"""Store: the adapters of all tenants, as bytes with versions that never change.

    Store (abstract)
    ├── SqliteStore    one file on this machine
    ├── ObjectStore    a bucket or folder, through obstore: many machines
    └── CachedStore    a SqliteStore in front of a slow store

A history is only ever added to: putting makes the next version, rolling back puts an old version's bytes again, deleting puts
a tombstone. A version's number is never used twice, so a name that comes back cannot answer with what it was before.
"""

import abc
import contextlib
import dataclasses
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from veratune.errors import AdapterFileError, AdapterNotFoundError, InvalidNameError, StoreError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LAST = 99_999_999  # versions count down from it in object keys, so that the newest comes first


@dataclasses.dataclass(frozen=True)
class Version:
    """One version of an adapter: its number from 1, its bytes' size (0: it was deleted then), and when it came, in seconds since 1970."""

    number: int
    size: int
    created: float


@dataclasses.dataclass(frozen=True)
class Entry:
    """An adapter in a list: its name, and its newest version."""

    name: str
    version: Version


class Store(abc.ABC):
    """Adapters by tenant and name. All methods may be called from several threads and raise InvalidNameError for a bad name.

    What `put` returned for is stored, whatever happens to this process then.
    """

    @abc.abstractmethod
    def put(self, tenant: str, name: str, data: bytes) -> Version:
        """Store the next version. Raises AdapterFileError for no bytes at all."""

    @abc.abstractmethod
    def newest(self, tenant: str, name: str) -> Version:
        """The version that answers. Raises AdapterNotFoundError."""

    @abc.abstractmethod
    def get(self, tenant: str, name: str, number: int) -> bytes:
        """The bytes of one version. Raises AdapterNotFoundError, also for a version that was deleted."""

    @abc.abstractmethod
    def versions(self, tenant: str, name: str) -> list[Version]:
        """All versions, the newest first, tombstones too. Raises AdapterNotFoundError for a name that was never there."""

    @abc.abstractmethod
    def delete(self, tenant: str, name: str) -> Version:
        """Put a tombstone over an adapter: it does not answer any more, and the bytes of its versions go. Raises AdapterNotFoundError."""

    @abc.abstractmethod
    def names(self, tenant: str, after: str = "", limit: int = 100) -> list[Entry]:
        """At most `limit` adapters of a tenant that are not deleted, by name, those behind `after`."""

    def roll_back(self, tenant: str, name: str, number: int) -> Version:
        """Put an old version's bytes as the newest version. Raises AdapterNotFoundError."""
        return self.put(tenant, name, self.get(tenant, name, number))

    def close(self) -> None:  # noqa: B027 (some stores hold nothing)
        """Give back what the store holds."""


def check_name(what: str, name: str) -> None:
    """Raise InvalidNameError for a tenant's or adapter's name that is not letters, digits, dots, dashes and underscores."""
    if not _NAME.fullmatch(name):
        shown = name if len(name) <= 40 else f"{name[:40]}..."
        raise InvalidNameError(
            f"{what} {shown!r} cannot be used: 1 to 128 letters, digits, dots, dashes and underscores are wanted, a letter or digit first"
        )


class SqliteStore(Store):
    """One SQLite file in write-ahead mode; every thread has a connection of its own."""

    def __init__(self, path: str | Path) -> None:
        """path: the file, made if it is not there. Raises StoreError where it cannot be opened as a store."""
        self.path = Path(path)
        self._local = threading.local()
        self._all: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._write() as db:
                db.execute(
                    "CREATE TABLE IF NOT EXISTS versions (tenant TEXT NOT NULL, name TEXT NOT NULL, number INTEGER NOT NULL, "
                    "size INTEGER NOT NULL, created REAL NOT NULL, data BLOB, PRIMARY KEY (tenant, name, number))"
                )
                db.execute("CREATE TABLE IF NOT EXISTS newest (tenant TEXT NOT NULL, name TEXT NOT NULL, number INTEGER NOT NULL, "
                           "size INTEGER NOT NULL, created REAL NOT NULL, PRIMARY KEY (tenant, name)) WITHOUT ROWID")  # fmt: skip
        except (OSError, StoreError) as error:
            raise StoreError(
                f"{self.path}: cannot be opened as a store of adapters ({error})"
            ) from error

    def put(self, tenant: str, name: str, data: bytes) -> Version:
        if not data:
            raise AdapterFileError(f"adapter {name!r} of {tenant!r} has no bytes")
        return self._add(tenant, name, data)

    def newest(self, tenant: str, name: str) -> Version:
        _check(tenant, name)
        row = self._read(
            "SELECT number, size, created FROM newest WHERE tenant = ? AND name = ?", (tenant, name)
        )
        if not row or not row[0][1]:
            raise AdapterNotFoundError(f"no adapter {name!r}")
        return Version(*row[0])

    def get(self, tenant: str, name: str, number: int) -> bytes:
        _check(tenant, name)
        row = self._read(
            "SELECT data FROM versions WHERE tenant = ? AND name = ? AND number = ?",
            (tenant, name, number),
        )
        if not row or row[0][0] is None:
            raise AdapterNotFoundError(f"no version {number} of adapter {name!r}")
        return bytes(row[0][0])

    def versions(self, tenant: str, name: str) -> list[Version]:
        _check(tenant, name)
        text = "SELECT number, size, created FROM versions WHERE tenant = ? AND name = ? ORDER BY number DESC"
        found = [Version(*row) for row in self._read(text, (tenant, name))]
        if not found:
            raise AdapterNotFoundError(f"no adapter {name!r}")
        return found

    def delete(self, tenant: str, name: str) -> Version:
        self.newest(tenant, name)
        return self._add(tenant, name, None)

    def names(self, tenant: str, after: str = "", limit: int = 100) -> list[Entry]:
        check_name("tenant", tenant)
        text = "SELECT name, number, size, created FROM newest WHERE tenant = ? AND name > ? AND size > 0 ORDER BY name LIMIT ?"
        return [
            Entry(name, Version(*rest)) for name, *rest in self._read(text, (tenant, after, limit))
        ]

    def close(self) -> None:
        with self._lock:
            for db in self._all:
                db.close()
            self._all = []
            self._local = threading.local()

    def keep(self, tenant: str, name: str, version: Version, data: bytes) -> None:
        """Store a version under a number of somebody else's, as a cache does."""
        _check(tenant, name)
        with self._write() as db:
            self._insert(db, tenant, name, version, data)

    def shrink(self, limit: int) -> int:
        """Forget the versions that came first until the bytes of all are at most `limit`. Returns how many went."""
        with self._write() as db:
            total, gone = db.execute("SELECT coalesce(sum(size), 0) FROM versions").fetchone()[0], 0
            for rowid, size in db.execute(
                "SELECT rowid, size FROM versions ORDER BY rowid"
            ).fetchall():
                if total <= limit:
                    break
                db.execute("DELETE FROM versions WHERE rowid = ?", (rowid,))
                total, gone = total - size, gone + 1
        return gone

    def _add(self, tenant: str, name: str, data: bytes | None) -> Version:
        _check(tenant, name)
        with self._write() as db:
            row = db.execute(
                "SELECT number FROM newest WHERE tenant = ? AND name = ?", (tenant, name)
            ).fetchone()
            version = Version((row[0] if row else 0) + 1, len(data or b""), time.time())
            if data is None:
                db.execute(
                    "UPDATE versions SET data = NULL WHERE tenant = ? AND name = ?", (tenant, name)
                )
            self._insert(db, tenant, name, version, data)
        return version

    @staticmethod
    def _insert(
        db: sqlite3.Connection, tenant: str, name: str, version: Version, data: bytes | None
    ) -> None:
        values = (tenant, name, version.number, version.size, version.created)
        db.execute("INSERT OR REPLACE INTO versions VALUES (?, ?, ?, ?, ?, ?)", (*values, data))
        db.execute("INSERT OR REPLACE INTO newest VALUES (?, ?, ?, ?, ?)", values)

    def _connection(self) -> sqlite3.Connection:
        found: sqlite3.Connection | None = getattr(self._local, "db", None)
        if found is None:
            found = sqlite3.connect(
                self.path, timeout=30, isolation_level=None, check_same_thread=False
            )
            found.execute("PRAGMA journal_mode = WAL")
            found.execute(
                "PRAGMA synchronous = FULL"
            )  # what was acknowledged outlives a power cut too
            self._local.db = found
            with self._lock:
                self._all.append(found)
        return found

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        try:
            db = self._connection()
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: {error}") from error

    def _read(self, text: str, values: Sequence[Any]) -> list[Any]:
        try:
            return self._connection().execute(text, values).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: {error}") from error


class ObjectStore(Store):
    """A bucket or folder through obstore: s3://, gs://, az://, file://. Every version is an object that is written once.

    Keys are TENANT/NAME/NUMBER, numbers counting down, so that the newest version is the first of a list. Two machines that put at once get
    two versions: an object is created or not, never replaced.
    """

    def __init__(self, store: Any) -> None:
        """store: an obstore store, such as obstore.store.from_url("s3://bucket/adapters")."""
        self.store = store

    @classmethod
    def from_url(cls, url: str, **options: Any) -> "ObjectStore":
        """A store at a URL; options: as obstore takes them. Raises StoreError."""
        import obstore.store

        try:
            return cls(obstore.store.from_url(url, **options))
        except Exception as error:
            raise StoreError(
                f"{url}: no object store: {' '.join(str(error).split())[:200]}"
            ) from error

    def put(self, tenant: str, name: str, data: bytes) -> Version:
        if not data:
            raise AdapterFileError(f"adapter {name!r} of {tenant!r} has no bytes")
        return self._add(tenant, name, data)

    def newest(self, tenant: str, name: str) -> Version:
        found = self._history(tenant, name)
        if not found or not found[0].size:
            raise AdapterNotFoundError(f"no adapter {name!r}")
        return found[0]

    def get(self, tenant: str, name: str, number: int) -> bytes:
        import obstore

        _check(tenant, name)
        try:
            with _errors("read"):
                data = bytes(obstore.get(self.store, _key(tenant, name, number)).bytes())
        except FileNotFoundError:
            data = b""
        if not data:
            raise AdapterNotFoundError(f"no version {number} of adapter {name!r}")
        return data

    def versions(self, tenant: str, name: str) -> list[Version]:
        found = self._history(tenant, name)
        if not found:
            raise AdapterNotFoundError(f"no adapter {name!r}")
        return found

    def delete(self, tenant: str, name: str) -> Version:
        import obstore

        self.newest(tenant, name)
        tombstone = self._add(tenant, name, b"")
        with _errors("delete"):
            obstore.delete(
                self.store,
                [
                    _key(tenant, name, v.number)
                    for v in self._history(tenant, name)
                    if v.number < tombstone.number
                ],
            )
        return tombstone

    def names(self, tenant: str, after: str = "", limit: int = 100) -> list[Entry]:
        import obstore

        check_name("tenant", tenant)
        with _errors("list"):
            found = obstore.list_with_delimiter(self.store, tenant)["common_prefixes"]
        out: list[Entry] = []
        for name in sorted(path.rpartition("/")[2] for path in found):
            if name > after and len(out) < limit:
                newest = self._history(tenant, name)[:1]
                out += [Entry(name, version) for version in newest if version.size]
        return out

    def _history(self, tenant: str, name: str) -> list[Version]:
        import obstore

        _check(tenant, name)
        with _errors("list"):
            objects = [
                entry for page in obstore.list(self.store, f"{tenant}/{name}") for entry in page
            ]
        found = [
            Version(
                _LAST - int(str(entry["path"]).rpartition("/")[2]),
                entry["size"],
                entry["last_modified"].timestamp(),
            )
            for entry in objects
        ]
        return sorted(found, key=lambda version: -version.number)

    def _add(self, tenant: str, name: str, data: bytes) -> Version:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        while True:
            number = max((version.number for version in self._history(tenant, name)), default=0) + 1
            try:
                with _errors("write"):
                    obstore.put(self.store, _key(tenant, name, number), data, mode="create")
            except AlreadyExistsError:  # another machine was faster
                continue
            return Version(number, len(data), time.time())


class CachedStore(Store):
    """Another store with its versions' bytes kept on this machine.

    A version never changes, so its bytes are asked for once; which version is the newest is asked for again after `refresh_seconds` seconds, at once for
    what was put or deleted here.
    """

    def __init__(
        self,
        origin: Store,
        cache: SqliteStore,
        refresh_seconds: float = 2.0,
        limit: int = 10 * 2**30,
    ) -> None:
        """limit: bytes of the cache."""
        self.origin, self.cache, self.refresh_seconds, self.limit = (
            origin,
            cache,
            refresh_seconds,
            limit,
        )
        self._newest: dict[tuple[str, str], tuple[float, Version]] = {}
        self._bytes = 0

    def put(self, tenant: str, name: str, data: bytes) -> Version:
        version = self.origin.put(tenant, name, data)
        self._keep(tenant, name, version, data)
        self._newest[tenant, name] = (time.monotonic(), version)
        return version

    def newest(self, tenant: str, name: str) -> Version:
        known = self._newest.get((tenant, name))
        if known is not None and time.monotonic() - known[0] < self.refresh_seconds:
            return known[1]
        self._newest.pop((tenant, name), None)
        version = self.origin.newest(tenant, name)
        self._newest[tenant, name] = (time.monotonic(), version)
        return version

    def get(self, tenant: str, name: str, number: int) -> bytes:
        try:
            return self.cache.get(tenant, name, number)
        except AdapterNotFoundError:
            data = self.origin.get(tenant, name, number)
            self._keep(tenant, name, Version(number, len(data), time.time()), data)
            return data

    def versions(self, tenant: str, name: str) -> list[Version]:
        return self.origin.versions(tenant, name)

    def delete(self, tenant: str, name: str) -> Version:
        self._newest.pop((tenant, name), None)
        tombstone = self.origin.delete(tenant, name)
        with contextlib.suppress(AdapterNotFoundError):
            self.cache.delete(tenant, name)
        return tombstone

    def names(self, tenant: str, after: str = "", limit: int = 100) -> list[Entry]:
        return self.origin.names(tenant, after, limit)

    def roll_back(self, tenant: str, name: str, number: int) -> Version:
        self._newest.pop((tenant, name), None)
        return self.origin.roll_back(tenant, name, number)  # which knows what was deleted elsewhere

    def close(self) -> None:
        self.origin.close()
        self.cache.close()

    def _keep(self, tenant: str, name: str, version: Version, data: bytes) -> None:
        self.cache.keep(tenant, name, version, data)
        self._bytes += len(data)
        if (
            self._bytes > self.limit // 8
        ):  # counting all is slow; an eighth over the limit does no harm
            self.cache.shrink(self.limit)
            self._bytes = 0


@contextlib.contextmanager
def _errors(what: str) -> Iterator[None]:
    """obstore's errors as StoreError; those that have a meaning here pass."""
    from obstore.exceptions import AlreadyExistsError, BaseError

    try:
        yield
    except (AlreadyExistsError, FileNotFoundError):
        raise
    except (BaseError, OSError) as error:
        raise StoreError(
            f"the object store could not {what}: {' '.join(str(error).split())[:200]}"
        ) from error


def _key(tenant: str, name: str, number: int) -> str:
    return f"{tenant}/{name}/{_LAST - number:08d}"


def _check(tenant: str, name: str) -> None:
    check_name("tenant", tenant)
    check_name("adapter name", name)
