"""The tasks of the comparison: which rows train, which stop a run and choose its rate, which are scored."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from veratune.tasks.base import Task
from veratune.tasks.text.classification import TextClassification, TextRegression
from veratune_lab.paper.glue import GLUE

DEV = "dev"  # the split of training rows that stops a run and chooses its learning rate
SCORED = "validation"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """One task and how a run on it is trained.

    Args:
        title: Name in tables.
        glue: The task's key in `GLUE`.
        dev: Training rows set aside for early stopping and for the choice of the rate.
        first: Train on so many rows from the top of the file; None trains on all of them.
        scored: Validation rows that are scored, from the top of the file; None scores all of them.
        settings: Settings of the run.
    """

    title: str
    glue: str
    dev: int = 400
    first: int | None = None
    scored: int | None = None
    settings: Mapping[str, Any]


def _whole(epochs: int, patience: int = 2) -> dict[str, Any]:
    return {"batch_size": 32, "epochs": epochs, "patience": patience, "group_by_length": True}


TASKS: dict[str, Protocol] = {
    "stsb-1500": Protocol(
        title="STS-B, first 1,500",
        glue="stsb",
        dev=300,
        first=1500,
        scored=500,
        settings={"batch_size": 16, "max_steps": 141, "save_steps": 10**6, "keep": "last"},
    ),
    "mrpc": Protocol(title="MRPC", glue="mrpc", settings=_whole(5)),
    "stsb": Protocol(title="STS-B", glue="stsb", settings=_whole(4)),
    "rte": Protocol(title="RTE", glue="rte", dev=250, settings=_whole(5)),
    "cola": Protocol(title="CoLA", glue="cola", dev=800, settings=_whole(5)),
    "sst2": Protocol(title="SST-2", glue="sst2", dev=800, settings=_whole(2, 1)),
    "qnli": Protocol(title="QNLI", glue="qnli", dev=800, settings=_whole(3)),
}


class _Split:
    """A GLUE task with a split `dev` of its training rows, which no run trains on."""

    protocol: Protocol

    def load_examples(
        self, source: str, split: str = "train", config: str | None = None
    ) -> Dataset:
        own = self.protocol
        rows = super().load_examples(source, SCORED if split == SCORED else "train", config)  # type: ignore[misc]
        if split == SCORED:
            return rows if own.scored is None else rows.select(range(min(own.scored, len(rows))))
        order = np.arange(len(rows))
        if own.first is None:
            order = np.random.default_rng(0).permutation(len(rows))
        count = len(rows) - own.dev if own.first is None else own.first
        if split == DEV:
            return rows.select(order[count : count + own.dev])
        return rows.select(np.sort(order[:count]))

    def has_split(self, source: str, split: str) -> bool:
        return True


class _Classification(_Split, TextClassification): ...


class _Regression(_Split, TextRegression): ...


def task_of(protocol: Protocol) -> Task:
    """The task of a protocol, ranked by GLUE's own score."""
    glue = GLUE[protocol.glue]
    kind = _Regression if glue.score == "pearson" else _Classification
    task: Any = kind(glue.columns, glue.max_length)
    task.protocol, task.metric = protocol, glue.score
    return task


def predict(
    model: Any, task: Task, encoded: Dataset, processor: Any, batch: int = 32
) -> np.ndarray:
    """The logits of all rows, shape (rows, outputs), computed in batches of like length."""
    collate, rows = task.collator(processor), [encoded[i] for i in range(len(encoded))]
    order = np.argsort([len(row["input_ids"]) for row in rows], kind="stable")
    out: list[np.ndarray] = [np.empty(0)] * len(rows)
    with torch.no_grad():
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            inputs = collate([rows[i] for i in chosen])
            logits = model(**{k: v.to(model.device) for k, v in inputs.items()}).logits
            for i, row in zip(chosen, logits.float().cpu().numpy(), strict=True):
                out[i] = row
    return np.stack(out)


def scores_of(task: Task, logits: np.ndarray, labels: Sequence[float]) -> dict[str, float]:
    """The task's scores of logits against labels."""
    metrics = task.metrics()
    assert metrics is not None
    return metrics(SimpleNamespace(predictions=logits, label_ids=np.asarray(labels)))


def pack(logits: np.ndarray) -> str | list[int]:
    """Predictions as a line keeps them: a digit a row for classes, hundredths for numbers."""
    if logits.shape[1] == 1:
        return [round(float(100 * x)) for x in logits[:, 0]]
    return "".join(map(str, logits.argmax(1)))


def unpack(packed: str | list[int]) -> np.ndarray:
    """The inverse of `pack`: class numbers, or values."""
    return np.asarray([int(c) for c in packed] if isinstance(packed, str) else packed) / (
        1 if isinstance(packed, str) else 100
    )


def majority(labels: Sequence[float], score: str) -> float:
    """The score of the best constant prediction, times 100: the majority class, or 0."""
    if score != "accuracy":
        return 0.0
    return 100 * float(np.unique(np.asarray(labels), return_counts=True)[1].max()) / len(labels)
