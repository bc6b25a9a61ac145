"""JobRepository: training files, jobs and events in a SQLite database and a folder."""

import dataclasses
import json
import shutil
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path

from veratune.errors import JobNotFoundError
from veratune.formats.atomic import write_atomic
from veratune.serving.jobs.models import Event, Job, Level, Status, TrainingFile
from veratune.serving.sqlite_pool import ConnectionPool, Value
from veratune.serving.store.sqlite import free_space_problem

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, tenant TEXT, name TEXT, purpose TEXT, size INTEGER, created REAL);
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, tenant TEXT, model TEXT, file TEXT, validation TEXT, adapter TEXT,
    settings TEXT, status TEXT, created REAL, ended REAL, step INTEGER, steps INTEGER,
    version INTEGER, result TEXT, error TEXT);
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY, job TEXT, created REAL, level TEXT, message TEXT);
CREATE INDEX IF NOT EXISTS events_of ON events (job, number);
"""
_MESSAGE_LENGTH = 500  # characters of an event or an error that are kept


class JobRepository:
    """Files, jobs and events of all tenants on disk. Methods may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        """Open the folder, or create it. Raises StoreError."""
        self.folder = folder
        self._db = ConnectionPool(folder / "jobs.db")
        self._db.create(_SCHEMA, folder, "a folder of jobs", folder / "files")

    def problem(self) -> str | None:
        """The reason why jobs cannot be stored now; None if they can."""
        self._db.query("SELECT 1 FROM jobs LIMIT 1")
        return free_space_problem(self.folder, "jobs")

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    # Files

    def path_of(self, file: str) -> Path:
        """Where a file's bytes are."""
        return self.folder / "files" / f"{file}.jsonl"

    def add_file(self, file: TrainingFile, data: bytes) -> None:
        """Store a file: its bytes first, so that a listed file always has them."""
        write_atomic(self.path_of(file.id), data)
        self._db.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)", dataclasses.astuple(file))

    def files(self, tenant: str) -> list[TrainingFile]:
        """A tenant's files, newest first."""
        rows = self._db.query(
            "SELECT * FROM files WHERE tenant = ? ORDER BY created DESC", (tenant,)
        )
        return [TrainingFile(**row) for row in rows]

    def file(self, tenant: str, file: str) -> TrainingFile:
        """One file. Raises JobNotFoundError."""
        rows = self._db.query("SELECT * FROM files WHERE tenant = ? AND id = ?", (tenant, file))
        if not rows:
            raise JobNotFoundError(f"no file {file!r}")
        return TrainingFile(**rows[0])

    def read_file(self, tenant: str, file: str) -> bytes:
        """A file's bytes. Raises JobNotFoundError."""
        return self.path_of(self.file(tenant, file).id).read_bytes()

    def delete_unused_file(self, tenant: str, file: str) -> bool:
        """Delete a file unless an unfinished job uses it. Returns whether it was deleted."""
        found = self.file(tenant, file)
        deleted = self._db.execute(
            "DELETE FROM files WHERE id = ? AND NOT EXISTS (SELECT 1 FROM jobs WHERE tenant = ? "
            "AND status IN ('queued', 'running') AND (file = ? OR validation = ?))",
            (found.id, tenant, file, file),
        )
        if deleted:
            self.path_of(found.id).unlink(missing_ok=True)
        return bool(deleted)

    def delete_tenant(self, tenant: str) -> tuple[int, int]:
        """Delete a tenant's jobs, events and files, and their bytes on disk.

        Returns:
            The numbers of deleted jobs and files.
        """
        jobs = [row[0] for row in self._db.query("SELECT id FROM jobs WHERE tenant = ?", (tenant,))]
        files = [file.id for file in self.files(tenant)]
        for file in files:
            self.path_of(file).unlink(missing_ok=True)
        for job in jobs:
            if (self.folder / job).is_dir():
                shutil.rmtree(self.folder / job)
        with self._db.write() as db:
            for job in jobs:
                db.execute("DELETE FROM events WHERE job = ?", (job,))
            db.execute("DELETE FROM jobs WHERE tenant = ?", (tenant,))
            db.execute("DELETE FROM files WHERE tenant = ?", (tenant,))
        self._db.scrub()
        return len(jobs), len(files)

    # Jobs

    def add_job(self, job: Job) -> None:
        """Store a new job."""
        values: list[Value] = [
            json.dumps(dict(value)) if isinstance(value, Mapping) else value
            for value in (getattr(job, field.name) for field in dataclasses.fields(job))
        ]
        self._db.execute(f"INSERT INTO jobs VALUES ({', '.join('?' * len(values))})", values)

    def job(self, tenant: str, job: str) -> Job:
        """One job. Raises JobNotFoundError."""
        rows = self._db.query("SELECT * FROM jobs WHERE tenant = ? AND id = ?", (tenant, job))
        if not rows:
            raise JobNotFoundError(f"no job {job!r}")
        return _job(rows[0])

    def jobs(self, tenant: str, after: str = "", limit: int = 20) -> list[Job]:
        """A tenant's jobs, newest first; those created before the job `after`."""
        older, values = "", [tenant]
        if after:
            older = "AND rowid < (SELECT rowid FROM jobs WHERE tenant = ? AND id = ?)"
            values += [tenant, after]
        rows = self._db.query(
            f"SELECT * FROM jobs WHERE tenant = ? {older} ORDER BY rowid DESC LIMIT ?",
            (*values, limit),
        )
        return [_job(row) for row in rows]

    def count(self, tenant: str, *statuses: Status) -> int:
        """How many of a tenant's jobs have one of these states."""
        marks = ", ".join("?" * len(statuses))
        rows = self._db.query(
            f"SELECT count(*) FROM jobs WHERE tenant = ? AND status IN ({marks})",
            (tenant, *statuses),
        )
        return int(rows[0][0])

    def next_job(self) -> Job | None:
        """The job to run: one that a restart interrupted, else the oldest in the queue."""
        rows = self._db.query(
            "SELECT * FROM jobs WHERE status IN ('running', 'queued') "
            "ORDER BY status = 'queued', created LIMIT 1"
        )
        return _job(rows[0]) if rows else None

    def status(self, job: str) -> Status:
        """A job's state."""
        status: Status = self._db.query("SELECT status FROM jobs WHERE id = ?", (job,))[0][0]
        return status

    def mark_running(self, job: str) -> bool:
        """Note that a job runs. Returns False for one that was cancelled meanwhile."""
        changed = self._db.execute(
            "UPDATE jobs SET status = 'running' WHERE id = ? AND status IN ('queued', 'running')",
            (job,),
        )
        return changed > 0

    def set_progress(self, job: str, step: int, steps: int) -> None:
        """Note how many optimizer steps are done."""
        self._db.execute("UPDATE jobs SET step = ?, steps = ? WHERE id = ?", (step, steps, job))

    def set_result(self, job: str, version: int, result: Mapping[str, object]) -> None:
        """Note the published version and the metrics of the run."""
        self._db.execute(
            "UPDATE jobs SET version = ?, result = ? WHERE id = ?",
            (version, json.dumps(dict(result)), job),
        )

    def finish(self, job: str, status: Status, message: str) -> bool:
        """End a job that has not ended, with a line in its log.

        Args:
            job: Its id.
            status: The state it ends in.
            message: The log line; for a failed job also its error.

        Returns:
            False if the job had ended already.
        """
        error = message[:_MESSAGE_LENGTH] if status == "failed" else ""
        with self._db.write() as db:
            changed = db.execute(
                "UPDATE jobs SET status = ?, ended = ?, error = ? "
                "WHERE id = ? AND status IN ('queued', 'running')",
                (status, time.time(), error, job),
            ).rowcount
            if changed:
                _insert_event(db, job, message, "error" if error else "info")
        return changed > 0

    # Events

    def add_event(self, job: str, message: str, level: Level = "info") -> None:
        """Append a line to a job's log."""
        with self._db.write() as db:
            _insert_event(db, job, message, level)

    def events(self, tenant: str, job: str, after: int = 0, limit: int = 20) -> list[Event]:
        """A job's log, newest line first; lines older than number `after`."""
        rows = self._db.query(
            "SELECT number, created, level, message FROM events WHERE job = ? AND number < ? "
            "ORDER BY number DESC LIMIT ?",
            (self.job(tenant, job).id, after or 2**62, limit),
        )
        return [Event(**row) for row in rows]

    def last_error(self, job: str) -> str:
        """The newest error in a job's log; "" without one."""
        rows = self._db.query(
            "SELECT message FROM events WHERE job = ? AND level = 'error' "
            "ORDER BY number DESC LIMIT 1",
            (job,),
        )
        return str(rows[0][0]) if rows else ""


def _insert_event(db: sqlite3.Connection, job: str, message: str, level: Level) -> None:
    db.execute(
        "INSERT INTO events (job, created, level, message) VALUES (?, ?, ?, ?)",
        (job, time.time(), level, message[:_MESSAGE_LENGTH]),
    )


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    values["settings"] = json.loads(values["settings"])
    values["result"] = json.loads(values["result"])
    return Job(**values)
