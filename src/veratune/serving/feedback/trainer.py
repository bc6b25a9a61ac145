"""FeedbackTrainer: runs `veratune train-feedback` when tenants have sent enough feedback."""

import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from veratune.errors import StoreError
from veratune.serving.feedback.models import Due, Example
from veratune.serving.feedback.repository import FeedbackRepository
from veratune.serving.jobs.models import Setting
from veratune.serving.jobs.process import TrainingProcess, kill_orphans

log = logging.getLogger(__name__)
TRAIN = (sys.executable, "-m", "veratune.cli.main", "train-feedback")
POLL = 0.5  # seconds between two looks
EXAMPLES = 1000  # of an adapter, newest
OnPublished = Callable[[str, str, Sequence[Example]], None]
RETRY = 60.0  # seconds before a failed run is tried again


class FeedbackTrainer:
    """A thread that trains all adapters with enough new feedback in one process at a time."""

    def __init__(
        self,
        repository: FeedbackRepository,
        folder: Path,
        flags: Mapping[str, Setting],
        min_examples: int,
        command: Sequence[str] = TRAIN,
        on_published: OnPublished | None = None,
    ) -> None:
        """Prepare; `start` trains.

        Args:
            repository: The feedback.
            folder: Where runs work; emptied after each.
            flags: Flags of `veratune train-feedback`.
            min_examples: New examples of an adapter that start a run.
            command: What starts it.
            on_published: Called with (tenant, adapter, its examples) for each new version.
        """
        self.repository, self.folder, self.flags = repository, folder, dict(flags)
        self.min_examples, self.command = min_examples, tuple(command)
        self.on_published = on_published
        self._stop, self._abort = threading.Event(), threading.Event()
        self._running = threading.Lock()  # held while a run's files are on disk
        self._thread = threading.Thread(target=self._loop, name="veratune-feedback", daemon=True)
        self.problem: str | None = None

    def start(self) -> None:
        """Train until `close`. Files of a run that a killed server left behind are removed."""
        kill_orphans(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._thread.start()

    def close(self) -> None:
        """Stop. A run that is under way starts again at the next start."""
        self._stop.set()
        self._abort.set()
        if self._thread.is_alive():
            self._thread.join()

    def delete_tenant(self, tenant: str) -> int:
        """Delete a tenant's feedback. A run under way is ended first, and starts again without it.

        Returns:
            The number of deleted examples.
        """
        self._abort.set()
        with self._running:
            deleted = self.repository.delete_tenant(tenant)
            self._abort.clear()
        return deleted

    def _loop(self) -> None:
        wait = 0.0
        while not self._stop.wait(max(POLL, wait)):
            wait = 0.0
            try:
                with self._running:
                    if not self._abort.is_set() and self.repository.due(self.min_examples):
                        wait = 0.0 if self._run() else RETRY
            except (StoreError, OSError) as error:
                log.error("training on feedback failed, retry in %g s: %s", RETRY, error)
                self.problem, wait = "training on feedback failed; it is tried again", RETRY

    def _run(self) -> bool:
        """One run. Returns False if it failed by itself."""
        self.folder.mkdir(parents=True, exist_ok=True)
        flags = {**self.flags, "min_examples": self.min_examples}
        start, due = time.time(), self.repository.due(self.min_examples)
        process = TrainingProcess(self.folder / "now", self.command, flags)
        try:
            while process.running and not self._abort.is_set():
                time.sleep(POLL / 5)
        finally:
            process.close()
            shutil.rmtree(self.folder, ignore_errors=True)
        if not self._abort.is_set():
            self._tell_published(due, start)
        if self._abort.is_set() or not process.returncode:
            self.problem = None
            return True
        # What a run says may quote examples, so the log gets its status alone.
        log.error("training on feedback ended with status %s", process.returncode)
        self.problem = "training on feedback failed; it is tried again"
        return False

    def _tell_published(self, due: Sequence[Due], since: float) -> None:
        if self.on_published is None:
            return
        for entry in due:
            runs = self.repository.runs(entry.tenant)
            if any(
                run.adapter == entry.adapter and run.outcome == "published" and run.created >= since
                for run in runs
            ):
                examples = self.repository.usable(entry.tenant, entry.adapter, EXAMPLES)
                self.on_published(entry.tenant, entry.adapter, examples)
