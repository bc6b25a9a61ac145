"""GLUE: its tasks, the paper's settings for them (tables 8 and 2), and one cell of a table on them."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from veratune.config import VeraConfig
from veratune.tasks.base import Task
from veratune.tasks.text.classification import TextClassification, TextRegression
from veratune.training.methods import Method
from veratune_lab.paper.experiment import (
    Cell,
    Line,
    Place,
    Scale,
    Tuned,
    fine_tune,
    shared_folder,
    some,
)
from veratune_lab.paper.language_models import minilm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glue:
    """One task: its score, its columns where they are unusual, and training rows and epochs of the scaled and quick runs."""

    title: str
    score: str = "accuracy"
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rows: int
    epochs: float
    max_length: int = 128


GLUE = {
    "sst2": Glue(title="SST-2", rows=2000, epochs=3, max_length=64),
    "mrpc": Glue(title="MRPC", rows=1200, epochs=2),
    "cola": Glue(title="CoLA", score="matthews", rows=3000, epochs=3, max_length=64),
    "qnli": Glue(
        title="QNLI", columns={"text": "question", "pair": "sentence"}, rows=1500, epochs=1.5
    ),
    "rte": Glue(title="RTE", rows=500, epochs=1),
    "stsb": Glue(title="STS-B", score="pearson", rows=1500, epochs=2.5),
}
EVALUATED = 500  # rows of the scaled runs' evaluation

# Table 8: epochs, then learning rates of head and vectors, by model and task; and what the model's tasks have in common.
BASE, LARGE = "FacebookAI/roberta-base", "FacebookAI/roberta-large"
PAPER: dict[str, dict[str, tuple[int, float, float]]] = {
    BASE: {
        "sst2": (60, 4e-3, 4e-3), "mrpc": (30, 4e-3, 1e-2), "cola": (80, 1e-2, 1e-2), "qnli": (25, 4e-3, 1e-2),
        "rte": (160, 1e-2, 4e-3), "stsb": (80, 1e-2, 1e-2),
    },
    LARGE: {
        "sst2": (10, 6e-3, 1e-2), "mrpc": (40, 3e-3, 3e-2), "cola": (40, 6e-3, 1e-2), "qnli": (20, 2e-4, 1e-2),
        "rte": (40, 2e-3, 2e-2), "stsb": (20, 2e-3, 2e-2),
    },
}  # fmt: skip
PAPER_RANK = {BASE: 1024, LARGE: 256}
PAPER_MODEL: dict[str, dict[str, Any]] = {
    BASE: {"batch_size": 64, "max_length": 512},
    LARGE: {"batch_size": 128, "max_length": 128},  # four GPUs with 32 each
}
HUB = "nyu-mll/glue"
# LoRA's own settings, Hu et al. 2022, table 9: epochs, batch size, learning rate; rank 8 on query and value.
LORA: dict[str, dict[str, tuple[int, int, float]]] = {
    BASE: {
        "sst2": (60, 16, 5e-4), "mrpc": (30, 16, 4e-4), "cola": (80, 32, 4e-4), "qnli": (25, 32, 4e-4), "rte": (80, 32, 5e-4),
        "stsb": (40, 16, 4e-4),
    },
    LARGE: {
        "sst2": (10, 4, 4e-4), "mrpc": (20, 4, 3e-4), "cola": (20, 4, 2e-4), "qnli": (10, 4, 2e-4), "rte": (20, 8, 4e-4),
        "stsb": (30, 8, 2e-4),
    },
}  # fmt: skip


class _Subset:
    """A GLUE task on at most so many rows of each split, ranked by GLUE's own score."""

    counts: Mapping[str, int | None]

    def load_examples(
        self, source: str, split: str = "train", config: str | None = None
    ) -> Dataset:
        return some(super().load_examples(source, split, config), self.counts.get(split))  # type: ignore[misc]


class _Classification(_Subset, TextClassification): ...


class _Regression(_Subset, TextRegression): ...


def glue_task(name: str, rows: int | None, evaluated: int | None, max_length: int) -> Task:
    """A task on some of its rows; None: on all."""
    own = GLUE[name]
    kind = _Regression if own.score == "pearson" else _Classification
    task: Any = kind(own.columns, max_length)
    task.counts, task.metric = {"train": rows, "validation": evaluated}, own.score
    return task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One way to train: settings of the run, and the adapter's where it is VeRA."""

    settings: Mapping[str, Any]
    vera: VeraConfig


def scaled_run(
    task: str, trial: Trial, scale: Scale, place: Place, seed: int, method: Method | None = None
) -> Line:
    """One cell at the size of two cores: MiniLM, some rows, the score after the last epoch.

    method: another than the settings name. Runs with equal settings are shared among all tables.
    """
    own = GLUE[task]
    quick = scale == "quick"
    source = place.dataset(f"glue_{task}")
    settings = {
        "model": minilm(), "data": source, "batch_size": 32, "epochs": 1.0 if quick else own.epochs, "save_steps": 10**6, "keep": "last",
        "mixed_precision": "bf16", "group_by_length": True, **trial.settings,
    }  # fmt: skip
    rows, evaluated = (200, 100) if quick else (own.rows, EVALUATED)
    # Where data and models lie is no part of what a run is.
    key = {k: v for k, v in settings.items() if k not in ("model", "data")} | {
        "task": task,
        "rows": rows,
        "evaluated": evaluated,
    }
    if method is not None:
        key["kind"] = type(method).__name__
    folder = shared_folder(place, key, trial.vera, seed)
    line = fine_tune(
        settings,
        trial.vera,
        glue_task(task, rows, evaluated, own.max_length),
        place,
        seed,
        folder,
        method,
    )
    return line | {"rows": rows, "run": folder.name}


def paper_run(task: str, model: str, trial: Trial, place: Place, seed: int, folder: Path) -> Line:
    """One cell of the paper: all rows, every epoch evaluated, the best one kept."""
    source = place.dataset(f"glue_{task}", HUB)
    settings: dict[str, Any] = {
        "model": place.model(model.rpartition("/")[2], model),
        "data": source,
        "eval_data": source,
        "keep": "best",
    }
    settings |= trial.settings
    if source == HUB:
        settings["data_config"] = task
    own = glue_task(task, None, None, settings.pop("max_length", PAPER_MODEL[model]["max_length"]))
    return fine_tune(settings, trial.vera, own, place, seed, folder)


def paper_trial(task: str, model: str, method: str, **vera: Any) -> Trial:
    """VeRA (and the head alone, with its settings) as table 8 has them, or LoRA as its own paper has it."""
    config = VeraConfig(**{"rank": PAPER_RANK[model], "targets": ("query", "value"), **vera})
    if method == "LoRA":
        epochs, batch, lr = LORA[model][task]
        options = {"r": 8, "lora_alpha": 8 if model == BASE else 16}
        settings: dict[str, Any] = {
            "method": "peft:lora",
            "options": options,
            "epochs": epochs,
            "batch_size": batch,
            "lr": lr,
        }
        return Trial(settings=settings | {"head_lr": lr, "weight_decay": 0.1}, vera=config)
    epochs, head_lr, lr = PAPER[model][task]
    settings = {"epochs": epochs, "head_lr": head_lr, "lr": lr, **PAPER_MODEL[model]}
    return Trial(settings=settings | ({"method": "head"} if method == "Head" else {}), vera=config)


def score_of(line: Line) -> float:
    """GLUE's score of a line's task, in %."""
    return 100 * line["after"][GLUE[line["task"]].score]


class GlueTable(Tuned):
    """A table with trials of its own on some GLUE tasks."""

    def score(self, line: Line) -> float:
        return score_of(line)

    def cell(self, scale: Scale, task: str, method: str, trial: Trial, model: str = "") -> Cell:
        """A cell of this table: at the paper's own size where a model is named."""
        group = f"{model.rpartition('/')[2]} {GLUE[task].title}: {method}".strip()
        rates = [
            f"{key} {trial.settings[key]:g}"
            for key in ("lr", "b_lr", "head_lr")
            if key in trial.settings
        ]
        return Cell(
            name=f"{group}, {', '.join(rates)}", shown={"group": group, "task": task, "method": method, "model": model},
            run=functools.partial(self._run, scale, task, trial, model),
        )  # fmt: skip

    @staticmethod
    def _run(
        scale: Scale, task: str, trial: Trial, model: str, place: Place, seed: int, folder: Path
    ) -> Line:
        if model:
            return paper_run(task, model, trial, place, seed, folder)
        return scaled_run(task, trial, scale, place, seed)
