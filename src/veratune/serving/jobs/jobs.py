"""Jobs: fine-tuning for tenants. What tenants ask is checked here; the Worker runs it.

Files and jobs survive a restart, and a run that was interrupted resumes from its last checkpoint.
One job runs at a time.

    Jobs -> JobRepository (SQLite and a folder)
         -> Worker -> TrainingProcess (`veratune train`)
"""

import json
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from veratune.errors import ConfigError, DataError, InUseError, QueueFullError
from veratune.serving.jobs.batches import BatchRepository
from veratune.serving.jobs.models import Event, Job, Setting, TrainableModel, TrainingFile
from veratune.serving.jobs.repository import JobRepository
from veratune.serving.jobs.worker import Publish, Worker
from veratune.serving.names import check_not_auto

TRAIN = (sys.executable, "-m", "veratune.cli.main", "train")
CheckSettings = Callable[[str, Mapping[str, Setting]], None]


class Jobs:
    """Files and jobs of all tenants. Methods may be called from any thread."""

    def __init__(
        self,
        folder: str | Path,
        models: Mapping[str, TrainableModel],
        publish: Publish,
        *,
        check_settings: CheckSettings | None = None,
        command: Sequence[str] = TRAIN,
        max_jobs_per_tenant: int = 16,
        max_files_per_tenant: int = 100,
    ) -> None:
        """Open the folder; `start` runs jobs.

        Args:
            folder: Where jobs, files and runs are kept.
            models: The base models that can be trained, by served name.
            publish: Stores an adapter: (tenant, name, bytes) -> version.
            check_settings: Raises VeratuneError for settings whose adapter could not be published.
            command: What starts `veratune train`.
            max_jobs_per_tenant: Jobs of one tenant that may be queued or running.
            max_files_per_tenant: Files that one tenant may keep.

        Raises:
            StoreError: The folder cannot be opened.
        """
        self.repository = JobRepository(Path(folder))
        self.batches = BatchRepository(Path(folder))
        self.worker = Worker(self.repository, models, publish, command)
        self.models, self.check_settings = dict(models), check_settings
        self.max_jobs_per_tenant = max_jobs_per_tenant
        self.max_files_per_tenant = max_files_per_tenant

    def start(self) -> None:
        """Run jobs until `close`; interrupted ones first."""
        self.worker.start()

    def close(self) -> None:
        """Stop. A running job is resumed at the next start."""
        self.worker.close()
        self.batches.close()
        self.repository.close()

    def problem(self) -> str | None:
        """Why jobs cannot be taken or run now; None if they can."""
        return self.worker.problem or self.repository.problem()

    def add_file(self, tenant: str, name: str, purpose: str, data: bytes) -> TrainingFile:
        """Store a file of training rows.

        Args:
            tenant: Whose file.
            name: Its name on the client's machine.
            purpose: What the client says it is for.
            data: One JSON object a line.

        Raises:
            DataError: Names the first line that is no JSON object.
            QueueFullError: The tenant has too many files.
        """
        check_lines(data)
        if len(self.repository.files(tenant)) >= self.max_files_per_tenant:
            raise QueueFullError(
                f"this tenant has {self.max_files_per_tenant} files already; delete some"
            )
        return self.add_output_file(tenant, name, purpose, data)

    def add_output_file(self, tenant: str, name: str, purpose: str, data: bytes) -> TrainingFile:
        """Store a file that the server made, as `add_file` but whatever it holds."""
        identity = f"file-{secrets.token_hex(12)}"
        file = TrainingFile(identity, tenant, name[:200], purpose, len(data), time.time())
        self.repository.add_file(file, data)
        return file

    def files(self, tenant: str) -> list[TrainingFile]:
        """A tenant's files, newest first."""
        return self.repository.files(tenant)

    def file(self, tenant: str, file: str) -> TrainingFile:
        """One file. Raises JobNotFoundError."""
        return self.repository.file(tenant, file)

    def read_file(self, tenant: str, file: str) -> bytes:
        """A file's bytes. Raises JobNotFoundError."""
        return self.repository.read_file(tenant, file)

    def delete_file(self, tenant: str, file: str) -> None:
        """Delete a file. Raises JobNotFoundError, or InUseError while a job needs it."""
        if not self.repository.delete_unused_file(tenant, file):
            raise InUseError(f"an unfinished job uses file {file!r}; cancel the job first")

    def create(
        self,
        tenant: str,
        model: str,
        file: str,
        adapter: str | None = None,
        validation: str | None = None,
        settings: Mapping[str, Setting] | None = None,
    ) -> Job:
        """Queue a job.

        Args:
            tenant: Who creates it.
            model: A base model's served name.
            file: The training file's id.
            adapter: The name of the adapter; default the job's id.
            validation: The validation file's id.
            settings: Flags of `veratune train`.

        Raises:
            JobNotFoundError: The tenant has no such file.
            ConfigError: The model cannot be fine-tuned here, or a setting is invalid.
            UnsupportedError: The adapter could not be published here.
            DataError: A row has the wrong columns.
            QueueFullError: The tenant has too many unfinished jobs.
            InvalidNameError: No adapter can have this name.
        """
        if model not in self.models:
            wanted = " or ".join(map(repr, self.models))
            raise ConfigError(f"the model {model!r} cannot be fine-tuned here; {wanted} is wanted")
        check_not_auto("suffix", adapter or "")
        settings = dict(settings or {})
        if self.check_settings is not None:
            self.check_settings(model, settings)
        unfinished = self.repository.count(tenant, "queued", "running")
        if unfinished >= self.max_jobs_per_tenant:
            raise QueueFullError(
                f"{unfinished} jobs of this tenant are waiting or running already; try again later"
            )
        for name in filter(None, (file, validation)):
            self._check_columns(self.read_file(tenant, name), model)
        identity = f"job-{secrets.token_hex(8)}"
        job = Job(
            id=identity,
            tenant=tenant,
            model=model,
            file=file,
            validation=validation,
            adapter=adapter or identity,
            settings=settings,
            status="queued",
            created=time.time(),
            ended=None,
            step=0,
            steps=0,
            version=0,
            result={},
            error="",
        )
        self.repository.add_job(job)
        self.repository.add_event(identity, "the job is queued")
        self.worker.wake()
        return job

    def job(self, tenant: str, job: str) -> Job:
        """One job. Raises JobNotFoundError."""
        return self.repository.job(tenant, job)

    def list_jobs(self, tenant: str, after: str = "", limit: int = 20) -> list[Job]:
        """A tenant's jobs, newest first; those created before the job `after`."""
        return self.repository.jobs(tenant, after, limit)

    def events(self, tenant: str, job: str, after: int = 0, limit: int = 20) -> list[Event]:
        """A job's log, newest line first; lines older than number `after`."""
        return self.repository.events(tenant, job, after, limit)

    def cancel(self, tenant: str, job: str) -> Job:
        """End a job; one that has ended stays as it is. Raises JobNotFoundError."""
        found = self.repository.job(tenant, job)
        if self.repository.finish(found.id, "cancelled", "the job was cancelled"):
            self.worker.wake()
        return self.repository.job(tenant, job)

    def delete_tenant(self, tenant: str, seconds: float = 30.0) -> tuple[int, int]:
        """Delete a tenant's jobs, batches and files; unfinished jobs are cancelled.

        Args:
            tenant: Whose.
            seconds: How long to wait for a running job's end.

        Returns:
            The numbers of deleted jobs and files.

        Raises:
            InUseError: A running job did not end in time.
        """
        unfinished = {
            job.id
            for job in self.repository.jobs(tenant, limit=2**31)
            if job.status in ("queued", "running")
        }
        for job in unfinished:
            self.cancel(tenant, job)
        end = time.monotonic() + seconds
        while self.worker.current in unfinished:
            if time.monotonic() > end:
                raise InUseError("a job of this tenant is still ending; try again")
            time.sleep(0.05)
        self.batches.delete_tenant(tenant)
        return self.repository.delete_tenant(tenant)

    def _check_columns(self, data: bytes, model: str) -> None:
        wanted = self.models[model].columns
        for number, line in enumerate(data.split(b"\n"), 1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not any(set(columns) <= set(row) for columns in wanted):
                groups = ", or ".join(" and ".join(columns) for columns in wanted)
                raise DataError(
                    f"line {number} has {', '.join(sorted(row)) or 'nothing'}; "
                    f"for the model {model!r} a row has {groups}"
                )


def check_lines(data: bytes) -> None:
    """Raise DataError for data that is not one JSON object a line."""
    rows = 0
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # an unpaired surrogate cannot be encoded
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise DataError(
                f"line {number} is no JSON object in Unicode; one object a line is wanted"
            )
        rows += 1
    if not rows:
        raise DataError("the file has no rows; one JSON object a line is wanted")
