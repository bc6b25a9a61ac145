"""Records of fine-tuning jobs: training files, jobs, events, and the base models they may train
on.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Level = Literal["info", "error"]
Setting = str | int | float | list[str]  # the value of a flag of `veratune train`


@dataclasses.dataclass(frozen=True)
class TrainingFile:
    """An uploaded file of training or validation rows, one JSON object a line."""

    id: str
    tenant: str
    name: str
    purpose: str
    size: int
    created: float


@dataclasses.dataclass(frozen=True)
class Job:
    """One fine-tuning job.

    Attributes:
        id: Starts with "job-".
        tenant: Who created it.
        model: The base model's served name.
        file: The training file's id.
        validation: The validation file's id.
        adapter: The name under which the adapter is published.
        settings: Flags of `veratune train`.
        status: Its state.
        created: Seconds since 1970.
        ended: Seconds since 1970; None before the end.
        step: Optimizer steps done.
        steps: Optimizer steps in all; 0 before the first report.
        version: The published version; 0 before.
        result: The metrics that `veratune train --json` reported.
        error: Why the job failed.
    """

    id: str
    tenant: str
    model: str
    file: str
    validation: str | None
    adapter: str
    settings: Mapping[str, Setting]
    status: Status
    created: float
    ended: float | None
    step: int
    steps: int
    version: int
    result: Mapping[str, object]
    error: str


@dataclasses.dataclass(frozen=True)
class Event:
    """A line of a job's log."""

    number: int
    created: float
    level: Level
    message: str


@dataclasses.dataclass(frozen=True)
class TrainableModel:
    """A served base model that jobs may train on.

    Attributes:
        path: What `veratune train --model` gets.
        task: What `veratune train --task` gets.
        columns: A row must have all columns of one of these groups.
        on_published: Called with (tenant, adapter, bytes of the training file) after an adapter is
            published; returns a line for the job's log.
    """

    path: str
    task: str
    columns: tuple[tuple[str, ...], ...]
    on_published: Callable[[str, str, bytes], str] | None = None
