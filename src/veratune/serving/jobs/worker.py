"""Worker: runs queued jobs one after the other, and goes on when a job or the store fails."""

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence

from veratune.errors import StoreError, VeratuneError
from veratune.serving.jobs.models import Job, Setting, TrainableModel
from veratune.serving.jobs.process import TrainingProcess, kill_orphans, without_paths
from veratune.serving.jobs.repository import JobRepository
from veratune.serving.store.base import Version

log = logging.getLogger(__name__)
Publish = Callable[[str, str, bytes], Version]
POLL = 0.2  # seconds between two looks at a running job
PUBLISH_ATTEMPTS = 5


class Worker:
    """A supervised thread that runs jobs.

    A job that fails ends with its reason. An error of the database or the adapter store stops the
    worker for a moment only: it retries, waiting twice as long each time, at most `max_delay`.
    """

    def __init__(
        self,
        repository: JobRepository,
        models: Mapping[str, TrainableModel],
        publish: Publish,
        command: Sequence[str],
        *,
        first_delay: float = 1.0,
        max_delay: float = 60.0,
    ) -> None:
        """Prepare; `start` runs jobs.

        Args:
            repository: Where jobs are queued.
            models: The base models by served name.
            publish: Stores an adapter: (tenant, name, bytes) -> version.
            command: What starts `veratune train`.
            first_delay: Seconds before the first retry.
            max_delay: The most seconds between two retries.
        """
        self.repository, self.models, self.publish = repository, models, publish
        self.command = tuple(command)
        self.first_delay, self.max_delay = first_delay, max_delay
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._problem: str | None = None
        self.current: str | None = None  # the job whose files are in use
        self._to_fail: dict[str, str] = {}  # jobs whose failure could not be stored yet

    def start(self) -> None:
        """Run jobs until `close`; interrupted ones first."""
        kill_orphans(self.repository.folder)
        self._thread = threading.Thread(target=self._supervise, name="veratune-jobs", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look at the queue now."""
        self._wake.set()

    def close(self) -> None:
        """Stop. A running job is resumed at the next start."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def problem(self) -> str | None:
        """Why jobs do not run now; None if they do."""
        if self._thread is not None and not self._thread.is_alive():
            return "the job runner has stopped"
        return self._problem

    def _supervise(self) -> None:
        delay = self.first_delay
        while not self._stop.is_set():
            try:
                self._run_next()
            except Exception as error:  # the thread must outlive every mistake
                log.error("the job runner failed, retry in %g s: %s", delay, error)
                self._problem = "the job runner cannot store its jobs; it retries"
                self._stop.wait(delay)
                delay = min(self.max_delay, 2 * delay)
            else:
                self._problem, delay = None, self.first_delay

    def _run_next(self) -> None:
        for job_id, reason in list(self._to_fail.items()):
            self.repository.finish(job_id, "failed", reason)
            del self._to_fail[job_id]
        job = self.repository.next_job()
        if job is None:
            self._wake.wait(1.0)
            self._wake.clear()
            return
        self.current = job.id
        try:
            self._run(job)
        except Exception as error:
            log.exception("job %s failed", job.id)
            self._to_fail[job.id] = without_paths(f"the server could not run it: {error}")
            if isinstance(error, StoreError):
                raise
        finally:
            self.current = None

    def _run(self, job: Job) -> None:
        if not self.repository.mark_running(job.id):
            return
        process = TrainingProcess(
            self.repository.folder / job.id, self.command, self._flags_of(job)
        )
        try:
            resumed = process.resumed
            self._note(job, "resumed from its last checkpoint" if resumed else "training started")
            while process.running:
                if self._stop.is_set() or self._cancelled(job):
                    return
                self._report(job, process)
                self._wake.wait(POLL)
                self._wake.clear()
            self._report(job, process)
        finally:
            process.close()
        if self._stop.is_set() or self._cancelled(job):
            return
        if process.returncode:
            status = f"training ended with status {process.returncode}"
            self.repository.finish(job.id, "failed", self.repository.last_error(job.id) or status)
        else:
            self._publish(job)

    def _publish(self, job: Job) -> None:
        folder = self.repository.folder / job.id
        try:
            result = json.loads((folder / "result.json").read_text())
            data = (folder / "run" / "adapter.safetensors").read_bytes()
        except (OSError, ValueError) as error:
            log.error("job %s left no adapter: %s", job.id, error)
            self.repository.finish(job.id, "failed", "training ended and left no adapter")
            return
        result.pop("path", None)
        delay = self.first_delay
        for attempt in range(PUBLISH_ATTEMPTS):
            try:
                version = self.publish(job.tenant, job.adapter, data)
                break
            except StoreError as error:
                # Training was expensive: the store gets several chances.
                log.error("job %s: the adapter could not be stored: %s", job.id, error)
                if attempt + 1 == PUBLISH_ATTEMPTS or self._stop.wait(delay):
                    raise
                delay = min(self.max_delay, 2 * delay)
            except VeratuneError as error:
                reason = f"the adapter cannot be published: {error}"
                self.repository.finish(job.id, "failed", without_paths(reason))
                return
        self.repository.set_result(job.id, version.number, result)
        on_published = self.models[job.model].on_published
        if on_published is not None:
            rows = self.repository.path_of(job.file).read_bytes()
            self._note(job, on_published(job.tenant, job.adapter, rows))
        message = f"the adapter {job.adapter!r} is published as version {version.number}"
        self.repository.finish(job.id, "succeeded", message)

    def _flags_of(self, job: Job) -> dict[str, Setting]:
        model = self.models[job.model]
        flags: dict[str, Setting] = {
            "task": model.task,
            "model": model.path,
            "data": str(self.repository.path_of(job.file)),
        }
        if job.validation:
            flags["eval_data"] = str(self.repository.path_of(job.validation))
        return flags | dict(job.settings)

    def _report(self, job: Job, process: TrainingProcess) -> None:
        """Store what the run said since the last look. Training goes on if that fails."""
        progress = process.progress()
        lines = list(process.lines())
        try:
            if progress is not None:
                self.repository.set_progress(job.id, *progress)
            for line in lines:
                failed = line.startswith("veratune: ")
                text = without_paths(line.removeprefix("veratune: "))
                self.repository.add_event(job.id, text, "error" if failed else "info")
            self._problem = None
        except StoreError as error:
            log.error("job %s: its progress could not be stored: %s", job.id, error)
            self._problem = "the job runner cannot store the progress of a job"

    def _note(self, job: Job, message: str) -> None:
        try:
            self.repository.add_event(job.id, message)
        except StoreError as error:
            log.error("job %s: an event could not be stored: %s", job.id, error)

    def _cancelled(self, job: Job) -> bool:
        try:
            return self.repository.status(job.id) != "running"
        except StoreError as error:
            # Training is expensive: it goes on. A cancelled job's end is checked again when stored.
            log.error("job %s: its status could not be read: %s", job.id, error)
            self._problem = "the job runner cannot read its jobs"
            return False
