"""FeedbackRepository: examples and runs of all tenants in one SQLite file."""

import json
import secrets
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

from veratune.errors import JobNotFoundError, QueueFullError
from veratune.serving.feedback.models import Due, Example, FeedbackRun, Kind, Messages
from veratune.serving.sqlite_pool import ConnectionPool

FILE = "feedback.db"
HELD_OUT_EVERY = 5  # one of five usable examples of an adapter evaluates candidates
_SCHEMA = """
CREATE TABLE IF NOT EXISTS examples (
    number INTEGER PRIMARY KEY, id TEXT UNIQUE, tenant TEXT, adapter TEXT, kind TEXT,
    messages TEXT, held_out INTEGER, created REAL, trained INTEGER);
CREATE INDEX IF NOT EXISTS examples_of ON examples (tenant, adapter, number);
CREATE TABLE IF NOT EXISTS runs (
    number INTEGER PRIMARY KEY, tenant TEXT, adapter TEXT, created REAL, outcome TEXT,
    before REAL, after REAL, version INTEGER, reason TEXT);
"""


class FeedbackRepository:
    """Feedback of all tenants on disk. Methods may be called from any thread and process."""

    def __init__(self, path: str | Path, max_per_tenant: int = 10_000) -> None:
        """Open the file, or create it.

        Args:
            path: The SQLite file.
            max_per_tenant: Examples that one tenant may keep.

        Raises:
            StoreError: The file cannot be opened.
        """
        self.path, self.max_per_tenant = Path(path), max_per_tenant
        self._db = ConnectionPool(self.path)
        self._db.create(_SCHEMA, self.path, "feedback")

    def add(self, tenant: str, adapter: str, kind: Kind, messages: Messages) -> Example:
        """Store an example. Every fifth that can be trained on is held out instead.

        Args:
            tenant: Who sent it.
            adapter: The adapter to train on it.
            kind: A correction, or a rating.
            messages: The conversation, with the wanted completion last.

        Raises:
            QueueFullError: The tenant has too many examples.
        """
        with self._db.write() as db:
            count = "SELECT count(*) FROM examples WHERE tenant = ?"
            if db.execute(count, (tenant,)).fetchone()[0] >= self.max_per_tenant:
                raise QueueFullError(
                    f"this tenant has {self.max_per_tenant:,} feedback examples; delete some"
                )
            usable = db.execute(
                f"{count} AND adapter = ? AND kind != 'down'", (tenant, adapter)
            ).fetchone()[0]
            held_out = kind != "down" and usable % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            example = Example(
                f"feedback-{secrets.token_hex(12)}",
                tenant,
                adapter,
                kind,
                messages,
                held_out,
                time.time(),
                False,
            )
            db.execute(
                "INSERT INTO examples (id, tenant, adapter, kind, messages, held_out, created, "
                "trained) VALUES (?, ?, ?, ?, ?, ?, ?, 0)",
                (
                    example.id,
                    tenant,
                    adapter,
                    kind,
                    json.dumps(messages),
                    held_out,
                    example.created,
                ),
            )
        return example

    def examples(self, tenant: str, after: str = "", limit: int = 100) -> list[Example]:
        """A tenant's examples, newest first; those stored before the example `after`."""
        rows = self._db.query(
            "SELECT * FROM examples WHERE tenant = ? AND number < coalesce("
            "(SELECT number FROM examples WHERE tenant = ? AND id = ?), ?) "
            "ORDER BY number DESC LIMIT ?",
            (tenant, tenant, after, 0 if after else 2**62, limit),
        )
        return [_example(row) for row in rows]

    def usable(self, tenant: str, adapter: str, limit: int) -> list[Example]:
        """The newest examples of an adapter that can be trained on, oldest first."""
        rows = self._db.query(
            "SELECT * FROM examples WHERE tenant = ? AND adapter = ? AND kind != 'down' "
            "ORDER BY number DESC LIMIT ?",
            (tenant, adapter, limit),
        )
        return [_example(row) for row in reversed(rows)]

    def delete(self, tenant: str, example: str) -> None:
        """Delete an example. Raises JobNotFoundError."""
        changed = self._db.execute(
            "DELETE FROM examples WHERE tenant = ? AND id = ?", (tenant, example)
        )
        if not changed:
            raise JobNotFoundError(f"no feedback {example!r}")

    def due(self, least: int) -> list[Due]:
        """The adapters with at least `least` new examples."""
        rows = self._db.query(
            "SELECT tenant, adapter, count(*) FROM examples WHERE trained = 0 AND kind != 'down' "
            "GROUP BY tenant, adapter HAVING count(*) >= ? ORDER BY tenant, adapter",
            (least,),
        )
        return [Due(*row) for row in rows]

    def has(self, tenant: str, examples: Sequence[Example]) -> bool:
        """Whether all of these examples are still stored: their tenant may have deleted some."""
        ids = {
            row[0] for row in self._db.query("SELECT id FROM examples WHERE tenant = ?", (tenant,))
        }
        return all(example.id in ids for example in examples)

    def finish(self, run: FeedbackRun, examples: Sequence[Example]) -> None:
        """Note a run's outcome, and that it used these examples; nothing for deleted ones."""
        with self._db.write() as db:
            changed = sum(
                db.execute("UPDATE examples SET trained = 1 WHERE id = ?", (example.id,)).rowcount
                for example in examples
            )
            if changed:
                db.execute(
                    "INSERT INTO runs (tenant, adapter, created, outcome, before, after, version, "
                    "reason) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        run.tenant,
                        run.adapter,
                        run.created,
                        run.outcome,
                        run.before,
                        run.after,
                        run.version,
                        run.reason[:500],
                    ),
                )

    def runs(self, tenant: str, limit: int = 100) -> list[FeedbackRun]:
        """What training on a tenant's feedback gave, newest first."""
        rows = self._db.query(
            "SELECT tenant, adapter, created, outcome, before, after, version, reason FROM runs "
            "WHERE tenant = ? ORDER BY number DESC LIMIT ?",
            (tenant, limit),
        )
        return [FeedbackRun(*row) for row in rows]

    def delete_tenant(self, tenant: str) -> int:
        """Delete a tenant's examples and runs, and their bytes on disk. Returns the examples."""
        with self._db.write() as db:
            db.execute("DELETE FROM runs WHERE tenant = ?", (tenant,))
            deleted = db.execute("DELETE FROM examples WHERE tenant = ?", (tenant,)).rowcount
        self._db.scrub()
        return deleted

    def close(self) -> None:
        """Close the database."""
        self._db.close()


def _example(row: sqlite3.Row) -> Example:
    values = dict(row)
    del values["number"]
    values["messages"] = json.loads(values["messages"])
    values["held_out"], values["trained"] = bool(values["held_out"]), bool(values["trained"])
    return Example(**values)
