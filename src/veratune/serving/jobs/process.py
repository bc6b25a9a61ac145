"""TrainingProcess: one `veratune train` in a process of its own, with its log lines and its
progress.
"""

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from veratune.formats.atomic import write_atomic
from veratune.serving.jobs.models import Setting

NICE = 10  # training gives way to serving
_PATH = re.compile(r"(?<![\w:/.])/(?:[^\s/:'\"]+/)*([^\s/:'\"]*)")


class TrainingProcess:
    """A running `veratune train`. Its folder has result.json, progress.jsonl, pid, and run/."""

    def __init__(self, folder: Path, command: Sequence[str], flags: Mapping[str, Setting]) -> None:
        """Start the process.

        Args:
            folder: The job's folder. A run that was interrupted there is resumed.
            command: The words before the flags.
            flags: Flags of `veratune train`.
        """
        self.folder = folder
        self.resumed = (folder / "run" / "run.yaml").is_file()
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._read = 0  # bytes of progress.jsonl
        folder.mkdir(exist_ok=True)
        words = [*command]
        for key, value in flags.items():
            words += [f"--{key.replace('_', '-')}", _word(value)]
        words += ["--out", str(folder / "run"), "--json", "true", "--preview", "0"]
        words += ["--resume", "true"] if self.resumed else []
        env = {
            # Half of the processors: more, and the threads of training and serving wait for each
            # other.
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2)),
            **os.environ,
            "TQDM_DISABLE": "1",
            "VERATUNE_PROGRESS_FILE": str(folder / "progress.jsonl"),
        }
        with (folder / "result.json").open("wb") as result:
            # In this session, because priorities count within a session only; in a process group of
            # its own, so that its children can be ended with it.
            self._process = subprocess.Popen(
                words,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=result,
                stderr=subprocess.PIPE,
                process_group=0,
            )
        write_atomic(folder / "pid", str(self._process.pid).encode())
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, NICE)
        self._reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._reader.start()

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.returncode

    def lines(self) -> Iterator[str]:
        """The log lines since the last call."""
        if not self.running:
            self._reader.join()
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._lines.get_nowait()

    def progress(self) -> tuple[int, int] | None:
        """(steps done, steps in all), if there is news since the last call."""
        try:
            with (self.folder / "progress.jsonl").open("rb") as file:
                file.seek(self._read)
                data = file.read()
        except OSError:
            return None
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        news = None
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                found = json.loads(line)
                news = (int(found["step"]), int(found["steps"]))
        return news

    def close(self) -> None:
        """Kill the process and its children if they still run, and wait for the end."""
        if self.running:
            kill_group(self._process.pid)
        self._process.wait()
        self._reader.join()
        if self._process.stderr is not None:
            self._process.stderr.close()
        (self.folder / "pid").unlink(missing_ok=True)

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        for raw in self._process.stderr:
            line = raw.decode(errors="replace").strip()
            if line:
                self._lines.put(line)


def without_paths(text: str) -> str:
    """A message with absolute paths cut to their last part: clients must not see the server's
    folders.

    >>> without_paths("/srv/jobs/files/file-1.jsonl: line 3 has no label")
    'file-1.jsonl: line 3 has no label'
    """
    return _PATH.sub(r"\1", text)


def kill_group(pid: int) -> None:
    """Kill a process and its children. Files are written whole, so the last checkpoint counts."""
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def kill_orphans(folder: Path) -> None:
    """End runs that a killed server left behind: two runs in one folder would overwrite each
    other.
    """
    for path in folder.glob("*/pid"):
        with contextlib.suppress(psutil.Error, ValueError, OSError):
            process = psutil.Process(int(path.read_text()))
            if str(path.parent / "run") in process.cmdline():
                kill_group(process.pid)
                process.wait(10)
        path.unlink(missing_ok=True)


def _word(value: Setting) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)
