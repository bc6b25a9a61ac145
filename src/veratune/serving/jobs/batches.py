"""BatchRepository: batches of API requests, and their results as they come.

A batch is a record in SQLite and a file with one result a line. A batch that a restart interrupts
goes on after its last result.
"""

import dataclasses
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veratune.errors import JobNotFoundError
from veratune.serving.sqlite_pool import ConnectionPool

UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
WINDOW = 24 * 3600.0  # seconds until a batch expires
_SCHEMA = """CREATE TABLE IF NOT EXISTS batches (
    number INTEGER PRIMARY KEY, id TEXT UNIQUE, tenant TEXT, status TEXT, record TEXT)"""


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of requests to one endpoint.

    Attributes:
        id: Starts with "batch_".
        tenants: Of the key that created it; the first one owns it.
        endpoint: The path that all requests are for.
        input_file: Its id.
        metadata: Of the client.
        created: Seconds since 1970.
        status: As the OpenAI API has it.
        times: When it came into each other state, in seconds since 1970.
        total: Requests in the file; 0 before it was read.
        completed: Requests with status 200.
        failed: Other requests.
        output_file: Id of the results.
        error_file: Id of the failed requests.
        errors: Why it failed: (line, message); line 0 for the whole file.
    """

    id: str
    tenants: tuple[str, ...]
    endpoint: str
    input_file: str
    metadata: Mapping[str, str]
    created: float
    status: str = "validating"
    times: Mapping[str, float] = dataclasses.field(default_factory=dict)
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file: str | None = None
    error_file: str | None = None
    errors: Sequence[tuple[int, str]] = ()

    @property
    def tenant(self) -> str:
        """Whose batch it is."""
        return self.tenants[0]

    @property
    def expires(self) -> float:
        """When it expires, in seconds since 1970."""
        return self.created + WINDOW


class BatchRepository:
    """Batches of all tenants on disk. Methods may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        """Open the folder, or create it. Raises StoreError."""
        self.folder = folder / "batches"
        self._db = ConnectionPool(folder / "batches.db")
        self._db.create(_SCHEMA, folder, "a folder of jobs", self.folder)

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def add(
        self, tenants: Sequence[str], endpoint: str, file: str, metadata: Mapping[str, str]
    ) -> Batch:
        """Store a new batch and return it."""
        batch = Batch(
            f"batch_{secrets.token_hex(12)}", tuple(tenants), endpoint, file, metadata, time.time()
        )
        self._db.execute(
            "INSERT INTO batches (id, tenant, status, record) VALUES (?, ?, ?, ?)",
            (batch.id, batch.tenant, batch.status, json.dumps(dataclasses.asdict(batch))),
        )
        return batch

    def get(self, tenant: str, batch: str) -> Batch:
        """One batch. Raises JobNotFoundError."""
        rows = self._db.query(
            "SELECT record FROM batches WHERE tenant = ? AND id = ?", (tenant, batch)
        )
        if not rows:
            raise JobNotFoundError(f"no batch {batch!r}")
        return _batch(rows[0][0])

    def list_batches(self, tenant: str, after: str = "", limit: int = 20) -> list[Batch]:
        """A tenant's batches, newest first; those created before the batch `after`."""
        rows = self._db.query(
            "SELECT record FROM batches WHERE tenant = ? AND (? = '' OR number < "
            "(SELECT number FROM batches WHERE tenant = ? AND id = ?)) "
            "ORDER BY number DESC LIMIT ?",
            (tenant, after, tenant, after, limit),
        )
        return [_batch(row[0]) for row in rows]

    def unfinished(self, tenant: str | None = None) -> list[Batch]:
        """Batches that have not ended, oldest first; of one tenant, or of all."""
        marks = ", ".join("?" * len(UNFINISHED))
        rows = self._db.query(
            f"SELECT record FROM batches WHERE status IN ({marks}) "
            "AND (? IS NULL OR tenant = ?) ORDER BY number",
            (*UNFINISHED, tenant, tenant),
        )
        return [_batch(row[0]) for row in rows]

    def update(self, batch: Batch, status: str | None = None, **changes: Any) -> Batch:
        """Store changes of an unfinished batch.

        Args:
            batch: As it is known; the stored one counts.
            status: The state that it comes into. A batch that is being cancelled stays so until
                it ends.
            changes: Other fields.

        Returns:
            The stored batch.

        Raises:
            JobNotFoundError: It was deleted.
        """
        with self._db.write() as db:
            row = db.execute("SELECT record FROM batches WHERE id = ?", (batch.id,)).fetchone()
            if row is None:
                raise JobNotFoundError(f"no batch {batch.id!r}")
            stored = _batch(row[0])
            if stored.status not in UNFINISHED:
                return stored
            if status is not None and not (stored.status == "cancelling" and status in UNFINISHED):
                changes |= {"status": status, "times": {**stored.times, status: time.time()}}
            stored = dataclasses.replace(stored, **changes)
            db.execute(
                "UPDATE batches SET status = ?, record = ? WHERE id = ?",
                (stored.status, json.dumps(dataclasses.asdict(stored)), batch.id),
            )
        return stored

    def append_result(self, batch: Batch, result: Mapping[str, Any]) -> None:
        """Keep the result of one request. Raises JobNotFoundError for a deleted batch."""
        self.get(batch.tenant, batch.id)
        with self._results(batch).open("a") as file:
            file.write(json.dumps(result) + "\n")

    def results(self, batch: Batch) -> list[dict[str, Any]]:
        """The results so far. A line that a crash cut is left out, and removed."""
        path = self._results(batch)
        if not path.exists():
            return []
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) != len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def drop_results(self, batch: Batch) -> None:
        """Delete the results of a batch that has ended; its files have them."""
        self._results(batch).unlink(missing_ok=True)

    def delete_tenant(self, tenant: str) -> None:
        """Delete a tenant's batches and their results."""
        rows = self._db.query("SELECT record FROM batches WHERE tenant = ?", (tenant,))
        self._db.execute("DELETE FROM batches WHERE tenant = ?", (tenant,))
        for row in rows:
            self.drop_results(_batch(row[0]))
        self._db.scrub()

    def _results(self, batch: Batch) -> Path:
        return self.folder / f"{batch.id}.jsonl"


def _batch(record: str) -> Batch:
    values = json.loads(record)
    values["tenants"] = tuple(values["tenants"])
    values["errors"] = tuple((line, message) for line, message in values["errors"])
    return Batch(**values)
