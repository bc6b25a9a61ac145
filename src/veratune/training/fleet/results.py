"""A fleet's results: one JSON line per tenant in a file per worker, and their totals."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from veratune.errors import OutputError

Line = dict[str, Any]


def log_of(folder: Path, rank: int) -> Path:
    """The file of a worker's results."""
    return folder / f"results-{rank}.jsonl"


class ResultLog:
    """One JSON line per finished tenant, synced before the tenant counts as finished."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> Iterator[Line]:
        """Yield all whole lines, and drop a line that a crash cut off from the file."""
        if not self.path.is_file():
            return
        with self.path.open("r+b") as file:
            yield from _whole_lines(file, self.path)
            file.truncate(file.tell())

    def add(self, line: Line) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


class ResultFollower:
    """Yields each line of all workers' files once, while they are written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[Path, int] = {}

    def new_lines(self) -> Iterator[Line]:
        for path in _logs(self._folder):
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                yield from _whole_lines(file, path)
                self._offsets[path] = file.tell()


def _whole_lines(file: BinaryIO, path: Path) -> Iterator[Line]:
    """Whole lines from where the file stands; it stands behind the last one in the end."""
    end = file.tell()
    for data in iter(file.readline, b""):
        if not data.endswith(b"\n"):
            break
        end += len(data)
        try:
            yield json.loads(data)
        except ValueError as error:
            raise OutputError(f"{path}: damaged ({error}); start again in another folder") from None
    file.seek(end)


def read_results(folder: Path) -> list[Line]:
    """The results of all workers, one entry per tenant, in the order of their names."""
    return sorted(ResultFollower(folder).new_lines(), key=lambda line: str(line["tenant"]))


@dataclasses.dataclass
class Totals:
    """What a run has done so far. Tenants' own results are in its log.

    Attributes:
        trained, refused: Tenants that got an adapter, and that did not.
        steps: Optimizer steps of all trained tenants.
        bytes: Of all their adapters.
    """

    trained: int = 0
    refused: int = 0
    steps: int = 0
    bytes: int = 0

    @property
    def finished(self) -> int:
        return self.trained + self.refused

    def add(self, line: Line) -> None:
        """Count one finished tenant."""
        if line["status"] == "trained":
            self.trained += 1
            self.steps += line["steps"]
            self.bytes += line["bytes"]
        else:
            self.refused += 1


@dataclasses.dataclass(frozen=True)
class FleetResult:
    """The result of a fleet's run.

    Attributes:
        out: Its folder.
        tenants: Tenants in the data (of this worker).
        trained, refused: How many got an adapter, and how many did not.
        steps: Optimizer steps over all trained tenants.
        seconds: Of this run.
        bytes: Of all adapters.
        logs: The files of results, one per worker.
    """

    out: str
    tenants: int
    trained: int
    refused: int
    steps: int
    seconds: float
    bytes: int
    logs: tuple[Path, ...] = dataclasses.field(repr=False)

    @property
    def results(self) -> list[Line]:
        """One entry per tenant, read from the logs: scores, or why it was refused."""
        return list(self.lines())

    def lines(self) -> Iterator[Line]:
        """The same, one after the other."""
        for path in self.logs:
            if path.is_file():
                with path.open("rb") as file:
                    yield from _whole_lines(file, path)


def summarise(folder: Path, seconds: float) -> FleetResult:
    """The result of all workers of a run, from their logs.

    Args:
        folder: The run's folder.
        seconds: How long the run took.
    """
    totals, logs = Totals(), _logs(folder)
    for line in ResultFollower(folder).new_lines():
        totals.add(line)
    return FleetResult(
        str(folder), totals.finished, **dataclasses.asdict(totals), seconds=seconds, logs=logs
    )


def _logs(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(folder.glob("results-*.jsonl")))
