"""Jobs: fine-tuning for tenants. A job trains in a process of its own, by `veratune train`, and its adapter goes into the store.

Jobs and the files they learn from are in a SQLite database and a folder: they survive a restart, and a run that was cut off goes on from its
last checkpoint. One job runs at a time.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import secrets
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil

from veratune.errors import ConfigError, DataError, JobNotFoundError, QueueFullError, StoreError
from veratune.formats.atomic import write_atomic
from veratune.serving.store.base import Version

log = logging.getLogger(__name__)
Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
_STEP = re.compile(r"(\d+)/(\d+) \[")  # what a progress bar says
_BAR = re.compile(r"\d+%\|")
NICE = 10  # training stands back behind answers


@dataclasses.dataclass(frozen=True)
class File:
    """Rows to learn from: one JSON object a line."""

    id: str
    tenant: str
    name: str
    purpose: str
    size: int
    created: float


@dataclasses.dataclass(frozen=True)
class Job:
    """One fine-tuning job.

    model: the base model's name; adapter: what it makes is called; settings: flags of `veratune train`; step, steps: how far it is;
    version: of the adapter in the store, 0 before; result: what the run measured.
    """

    id: str
    tenant: str
    model: str
    file: str
    validation: str | None
    adapter: str
    settings: Mapping[str, Any]
    status: Status
    created: float
    ended: float | None
    step: int
    steps: int
    version: int
    result: Mapping[str, Any]
    error: str


@dataclasses.dataclass(frozen=True)
class Event:
    """A line of a job's log."""

    number: int
    created: float
    level: Literal["info", "error"]
    message: str


@dataclasses.dataclass(frozen=True)
class Base:
    """What can be fine-tuned: where the base model lies, and the task of `veratune train` that is right for it."""

    path: str
    task: str
    columns: tuple[tuple[str, ...], ...]  # a row has all columns of one of these


class Jobs:
    """Files and jobs of all tenants, and the worker that runs them.

    bases: by the names that clients know; publish: puts an adapter's bytes into the store. Methods may be called from any thread.
    """

    def __init__(
        self, folder: str | Path, bases: Mapping[str, Base], publish: Callable[[str, str, bytes], Version], *,
        command: Sequence[str] = (sys.executable, "-m", "veratune.cli.main", "train"), waiting_tenant: int = 16, files_tenant: int = 100,
    ) -> None:  # fmt: skip
        """waiting_tenant, files_tenant: jobs that one tenant may have waiting, and files."""
        self.folder, self.bases, self.publish, self.command = (
            Path(folder),
            dict(bases),
            publish,
            tuple(command),
        )
        self.waiting_tenant, self.files_tenant = waiting_tenant, files_tenant
        self._lock = threading.RLock()
        self._news, self._stop = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        try:
            (self.folder / "files").mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                self.folder / "jobs.db", timeout=30, isolation_level=None, check_same_thread=False
            )
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.executescript(
                "CREATE TABLE IF NOT EXISTS files (id TEXT PRIMARY KEY, tenant TEXT, name TEXT, purpose TEXT, size INTEGER, created REAL);"
                "CREATE TABLE IF NOT EXISTS jobs (id TEXT PRIMARY KEY, tenant TEXT, model TEXT, file TEXT, validation TEXT, adapter TEXT, settings TEXT, "
                "status TEXT, created REAL, ended REAL, step INTEGER, steps INTEGER, version INTEGER, result TEXT, error TEXT);"
                "CREATE TABLE IF NOT EXISTS events (number INTEGER PRIMARY KEY, job TEXT, created REAL, level TEXT, message TEXT);"
                "CREATE INDEX IF NOT EXISTS events_of ON events (job, number);"
            )  # fmt: skip
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"{self.folder}: cannot be opened as a folder of jobs ({error})"
            ) from error

    def add_file(self, tenant: str, name: str, purpose: str, data: bytes) -> File:
        """Keep rows to learn from. Raises DataError naming the first line that is no JSON object, QueueFullError where the tenant has too many."""
        rows = 0
        for number, line in enumerate(data.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is no text
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise DataError(
                    f"line {number} is no JSON object in Unicode; one object a line is wanted"
                )
            rows += 1
        if not rows:
            raise DataError("the file has no rows; one JSON object a line is wanted")
        if len(self.files(tenant)) >= self.files_tenant:
            raise QueueFullError(f"this tenant has {self.files_tenant} files already; delete some")
        file = File(
            f"file-{secrets.token_hex(12)}", tenant, name[:200], purpose, len(data), time.time()
        )
        write_atomic(self._path(file.id), data)
        self._write("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)", dataclasses.astuple(file))
        return file

    def files(self, tenant: str) -> list[File]:
        """A tenant's files, the newest first."""
        rows = self._read("SELECT * FROM files WHERE tenant = ? ORDER BY created DESC", (tenant,))
        return [File(**row) for row in rows]

    def file(self, tenant: str, name: str) -> File:
        """A file by its id. Raises JobNotFoundError."""
        rows = self._read("SELECT * FROM files WHERE tenant = ? AND id = ?", (tenant, name))
        if not rows:
            raise JobNotFoundError(f"no file {name!r}")
        return File(**rows[0])

    def content(self, tenant: str, name: str) -> bytes:
        """A file's bytes. Raises JobNotFoundError."""
        return self._path(self.file(tenant, name).id).read_bytes()

    def drop_file(self, tenant: str, name: str) -> None:
        """Delete a file. Raises JobNotFoundError, or QueueFullError while a job wants it."""
        file = self.file(tenant, name)
        wanted = "SELECT id FROM jobs WHERE tenant = ? AND status IN ('queued', 'running') AND (file = ? OR validation = ?)"
        if self._read(wanted, (tenant, name, name)):
            raise QueueFullError(
                f"a job that has not ended learns from file {name!r}; cancel it first"
            )
        self._write("DELETE FROM files WHERE id = ?", (file.id,))
        self._path(file.id).unlink(missing_ok=True)

    def add(
        self, tenant: str, model: str, file: str, adapter: str | None = None, validation: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Job:  # fmt: skip
        """Let a job wait for its turn. adapter: the name of what it makes; default: the job's id.

        Raises JobNotFoundError for a file that is not the tenant's, ConfigError for a model that cannot be fine-tuned here, DataError for
        rows of the wrong columns, QueueFullError where the tenant has too many jobs waiting.
        """
        if model not in self.bases:
            raise ConfigError(
                f"the model {model!r} cannot be fine-tuned here; {' or '.join(map(repr, self.bases))} is wanted"
            )
        for name in filter(None, (file, validation)):
            self._check_columns(self.content(tenant, name), model)
        waiting = self._read(
            "SELECT id FROM jobs WHERE tenant = ? AND status = 'queued'", (tenant,)
        )
        if len(waiting) >= self.waiting_tenant:
            raise QueueFullError(
                f"{len(waiting)} jobs of this tenant are waiting already; try again later"
            )
        own = f"job-{secrets.token_hex(8)}"
        values = (
            own,
            tenant,
            model,
            file,
            validation,
            adapter or own,
            json.dumps(dict(settings or {})),
            "queued",
            time.time(),
            None,
            0,
            0,
            0,
            "{}",
            "",
        )
        self._write(f"INSERT INTO jobs VALUES ({', '.join('?' * len(values))})", values)
        self._say(own, "the job waits for its turn")
        self._news.set()
        return self.job(tenant, own)

    def job(self, tenant: str, name: str) -> Job:
        """A job by its id. Raises JobNotFoundError."""
        rows = self._read("SELECT * FROM jobs WHERE tenant = ? AND id = ?", (tenant, name))
        if not rows:
            raise JobNotFoundError(f"no job {name!r}")
        return _job(rows[0])

    def page(self, tenant: str, after: str = "", limit: int = 20) -> list[Job]:
        """A tenant's jobs, the newest first; those behind the job `after`."""
        where = "AND rowid < (SELECT rowid FROM jobs WHERE tenant = ? AND id = ?)" if after else ""
        values = (tenant, *((tenant, after) if after else ()), limit)
        return [
            _job(row)
            for row in self._read(
                f"SELECT * FROM jobs WHERE tenant = ? {where} ORDER BY rowid DESC LIMIT ?", values
            )
        ]

    def events(self, tenant: str, name: str, after: int = 0, limit: int = 20) -> list[Event]:
        """A job's log, the newest line first; lines older than number `after`."""
        job = self.job(tenant, name)
        text = "SELECT number, created, level, message FROM events WHERE job = ? AND number < ? ORDER BY number DESC LIMIT ?"
        return [Event(**row) for row in self._read(text, (job.id, after or 2**62, limit))]

    def cancel(self, tenant: str, name: str) -> Job:
        """End a job that has not ended; one that has stays as it is. Raises JobNotFoundError."""
        job = self.job(tenant, name)
        if job.status in ("queued", "running"):
            with self._lock:
                self._write(
                    "UPDATE jobs SET status = 'cancelled', ended = ? WHERE id = ? AND status IN ('queued', 'running')",
                    (time.time(), job.id),
                )
                self._say(job.id, "the job was cancelled")
            self._news.set()
        return self.job(tenant, name)

    def start(self) -> None:
        """Work in a thread until `close`; jobs that were cut off go on first."""
        self._kill_orphans()
        self._thread = threading.Thread(target=self._work, name="veratune-jobs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; a job that runs goes on at the next start."""
        self._stop.set()
        self._news.set()
        if self._thread is not None:
            self._thread.join()
        self._db.close()

    def _work(self) -> None:
        while not self._stop.is_set():
            rows = self._read(
                "SELECT * FROM jobs WHERE status IN ('running', 'queued') ORDER BY status = 'queued', created LIMIT 1",
                (),
            )
            if not rows:
                self._news.wait(1.0)
                self._news.clear()
                continue
            job = _job(rows[0])
            try:
                self._run(job)
            except Exception as error:
                log.exception("job %s failed", job.id)
                self._end(job.id, "failed", error=f"the server could not run it: {error}")

    def _run(self, job: Job) -> None:
        out = self.folder / job.id
        flags = {
            "task": self.bases[job.model].task,
            "model": self.bases[job.model].path,
            "data": self._path(job.file),
            "out": out / "run",
        }
        if job.validation:
            flags["eval_data"] = self._path(job.validation)
        words = [*self.command]
        for key, value in {**flags, **job.settings}.items():
            words += [
                f"--{key}",
                value
                if isinstance(value, str)
                else json.dumps(value)
                if isinstance(value, list)
                else str(value),
            ]
        resumed = (out / "run" / "run.yaml").is_file()
        out.mkdir(exist_ok=True)
        self._write("UPDATE jobs SET status = 'running' WHERE id = ?", (job.id,))
        self._say(
            job.id, "the job goes on from its last checkpoint" if resumed else "the job has begun"
        )
        # Half of the processor at most, or two pools of threads would wait for one another; and in this session, in which priorities count.
        env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2)), **os.environ}
        ending = ["--json", "true", "--preview", "0", *(["--resume", "true"] if resumed else [])]
        with (
            (out / "result.json").open("wb") as result,
            subprocess.Popen(
                [*words, *ending],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=result,
                stderr=subprocess.PIPE,
                process_group=0,
            ) as process,
        ):
            write_atomic(out / "pid", str(process.pid).encode())
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, process.pid, NICE)
            reader = threading.Thread(target=self._listen, args=(job.id, process), daemon=True)
            reader.start()
            while process.poll() is None:
                if self._stop.is_set() or self.job(job.tenant, job.id).status != "running":
                    _kill(process.pid)
                    process.wait()
                else:
                    self._news.wait(0.2)
                    self._news.clear()
            reader.join()
        (out / "pid").unlink(missing_ok=True)
        if self._stop.is_set() or self.job(job.tenant, job.id).status != "running":
            return
        if process.returncode:
            said = [
                event.message
                for event in self.events(job.tenant, job.id, limit=3)
                if event.level == "error"
            ]
            self._end(
                job.id,
                "failed",
                error=said[0] if said else f"training ended with status {process.returncode}",
            )
            return
        try:
            measured = json.loads((out / "result.json").read_text())
            data = (out / "run" / "adapter.safetensors").read_bytes()
        except (OSError, ValueError) as error:
            self._end(job.id, "failed", error=f"training ended and left no adapter ({error})")
            return
        measured.pop("path", None)
        version = self.publish(job.tenant, job.adapter, data)
        self._write(
            "UPDATE jobs SET version = ?, result = ? WHERE id = ?",
            (version.number, json.dumps(measured), job.id),
        )
        self._end(job.id, "succeeded")
        self._say(job.id, f"the adapter {job.adapter!r} is there, version {version.number}")

    def _listen(self, job: str, process: "subprocess.Popen[bytes]") -> None:
        """What the run says, as events; its progress bar as steps."""
        assert process.stderr is not None
        kept = b""
        while chunk := process.stderr.read1(4096):  # type: ignore[attr-defined]
            *lines, kept = re.split(rb"[\r\n]", kept + chunk)
            for line in lines:
                text = line.decode(errors="replace").strip()
                found = _STEP.search(text)
                if found:
                    self._write(
                        "UPDATE jobs SET step = ?, steps = ? WHERE id = ?",
                        (int(found[1]), int(found[2]), job),
                    )
                if text and not _BAR.search(text):
                    self._say(
                        job,
                        text.removeprefix("veratune: ")[:500],
                        "error" if text.startswith("veratune: ") else "info",
                    )

    def _end(self, job: str, status: Status, error: str = "") -> None:
        self._write(
            "UPDATE jobs SET status = ?, ended = ?, error = ? WHERE id = ? AND status != 'cancelled'",
            (status, time.time(), error[:500], job),
        )
        if error:
            self._say(job, error[:500], "error")

    def _kill_orphans(self) -> None:
        """End training that a server left behind when it was killed: two runs in one folder would spoil each other."""
        for path in self.folder.glob("*/pid"):
            with contextlib.suppress(psutil.Error, ValueError, OSError):
                process = psutil.Process(int(path.read_text()))
                if str(path.parent / "run") in process.cmdline():
                    _kill(process.pid)
                    process.wait(10)
            path.unlink(missing_ok=True)

    def _check_columns(self, data: bytes, model: str) -> None:
        wanted = self.bases[model].columns
        for number, line in enumerate(data.split(b"\n"), 1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not any(set(columns) <= set(row) for columns in wanted):
                raise DataError(
                    f"line {number} has {', '.join(sorted(row)) or 'nothing'}; for the model {model!r} a row has "
                    + ", or ".join(" and ".join(columns) for columns in wanted)
                )

    def _path(self, file: str) -> Path:
        return self.folder / "files" / f"{file}.jsonl"

    def _say(self, job: str, message: str, level: str = "info") -> None:
        self._write(
            "INSERT INTO events (job, created, level, message) VALUES (?, ?, ?, ?)",
            (job, time.time(), level, message),
        )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"{self.folder}: {error}") from error

    def _write(self, text: str, values: Sequence[Any]) -> None:
        with self._lock, self._errors():
            self._db.execute(text, values)

    def _read(self, text: str, values: Sequence[Any]) -> list[dict[str, Any]]:
        with self._lock, self._errors():
            return [dict(row) for row in self._db.execute(text, values).fetchall()]


def _job(row: Mapping[str, Any]) -> Job:
    return Job(
        **{**row, "settings": json.loads(row["settings"]), "result": json.loads(row["result"])}
    )


def _kill(pid: int) -> None:
    """End a process and its children at once: what it wrote is whole, and its last checkpoint counts."""
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
