"""A bounded pool of connections to one SQLite file, shared by the adapter store and the job
repository.

A connection for each thread would keep one file descriptor open for every worker thread that ever
ran. Here at most `size` connections exist, and a thread waits for one no longer than the time-out.
"""

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from veratune.errors import StoreError

Value = str | int | float | bytes | None


class ConnectionPool:
    """Connections to one SQLite file in write-ahead mode. All methods may be called from any
    thread.
    """

    def __init__(self, path: Path, size: int = 8, timeout: float = 5.0) -> None:
        """Open no connection yet.

        Args:
            path: The database file, created if it does not exist.
            size: The most connections that are open at once.
            timeout: Seconds to wait for a connection or a lock before StoreError.
        """
        self.path, self.timeout = path, timeout
        self._free: list[sqlite3.Connection] = []
        self._permits = threading.BoundedSemaphore(size)
        self._writing = threading.Lock()  # so that writers that wait hold no connection
        self._guard = threading.Lock()
        self._closed = False

    def create(self, schema: str, owner: Path, kind: str, *folders: Path) -> None:
        """Create the file with its folder and tables, where they are missing.

        Args:
            schema: Statements that create tables and indexes, separated by semicolons.
            owner: The file or folder that an error names.
            kind: What `owner` is opened as, for errors.
            folders: More folders to create.

        Raises:
            StoreError: It cannot be opened.
        """
        try:
            for folder in (self.path.parent, *folders):
                folder.mkdir(parents=True, exist_ok=True)
            with self.write() as db:
                for statement in filter(str.strip, schema.split(";")):
                    db.execute(statement)
        except (OSError, StoreError) as error:
            raise StoreError(f"{owner}: cannot be opened as {kind} ({error})") from error

    @contextlib.contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection for queries.

        Raises:
            StoreError: The database cannot be read, or no connection came free in time.
        """
        if not self._permits.acquire(timeout=self.timeout):
            raise self._busy()
        try:
            with self._as_store_error():
                db = self._take()
                try:
                    yield db
                finally:
                    self._give_back(db)
        finally:
            self._permits.release()

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A connection inside one transaction: committed at the end, rolled back on an error.

        Raises:
            StoreError: The database cannot be written, or stays locked longer than the time-out.
        """
        start = time.monotonic()
        if not self._writing.acquire(timeout=self.timeout):
            raise self._busy()
        try:
            with self.read() as db:
                left = max(0.05, self.timeout - (time.monotonic() - start))
                db.execute(f"PRAGMA busy_timeout = {int(1000 * left)}")
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                    db.execute("COMMIT")
                except BaseException:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    raise
        finally:
            self._writing.release()

    def query(self, sql: str, values: Sequence[Value] = ()) -> list[sqlite3.Row]:
        """All rows of a query. Raises StoreError."""
        with self.read() as db:
            return db.execute(sql, values).fetchall()

    def execute(self, sql: str, values: Sequence[Value] = ()) -> int:
        """Run one statement in a transaction. Returns the number of changed rows. Raises
        StoreError.
        """
        with self.write() as db:
            return db.execute(sql, values).rowcount

    def scrub(self, seconds: float = 5.0) -> None:
        """Remove deleted content from the files: it is in the write-ahead log until that is cut.

        Args:
            seconds: How long to wait for readers of the log.

        Raises:
            StoreError: Other connections read the log all that time.
        """
        end = time.monotonic() + seconds
        while True:
            with self.read() as db:
                if not db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                    return
            if time.monotonic() > end:
                raise StoreError(f"{self.path}: deleted content is still in the log; try again")
            time.sleep(0.05)

    def close(self) -> None:
        """Close the free connections; those in use close when they come back."""
        with self._guard:
            self._closed = True
            free, self._free = self._free, []
        for db in free:
            db.close()

    def _take(self) -> sqlite3.Connection:
        with self._guard:
            if self._closed:
                raise StoreError(f"{self.path}: the database is closed")
            if self._free:
                return self._free.pop()
        db = sqlite3.connect(
            self.path, timeout=self.timeout, isolation_level=None, check_same_thread=False
        )
        db.row_factory = sqlite3.Row
        try:
            db.execute("PRAGMA journal_mode = WAL")
            # An acknowledged write must survive a power cut.
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten
        except BaseException:
            db.close()
            raise
        return db

    def _give_back(self, db: sqlite3.Connection) -> None:
        with self._guard:
            if not self._closed:
                self._free.append(db)
                return
        db.close()

    def _busy(self) -> StoreError:
        return StoreError(f"{self.path}: no connection came free in {self.timeout:g} s")

    @contextlib.contextmanager
    def _as_store_error(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: {error}") from error
