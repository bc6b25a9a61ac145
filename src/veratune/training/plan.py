"""plan: a dry run. What the data is, and what memory, time and bytes training would take."""

import dataclasses
import math
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from veratune.config import VeraConfig
from veratune.errors import UnsupportedError
from veratune.formats.atomic import refuse_used
from veratune.training.build import MEASURED, Run, build_run
from veratune.training.packing import PackedDataset, best_fit
from veratune.training.result import peak_memory
from veratune.training.run import PreviewCallback
from veratune.training.settings import TrainSettings

PROBES = 3  # optimizer steps that are timed, behind the one on the longest examples
_SIMULATED = 200  # batches whose size is simulated
_OWN_DATA = ("grpo",)  # tasks whose batches are sampled from the model


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """What a run would do and take.

    Attributes:
        examples: Encoded training examples.
        evaluation_examples: Encoded evaluation examples.
        tokens: Smallest, median, 95th percentile, largest, all and trained tokens of the training
            examples; empty for tasks without tokens.
        rows: Rows of a packed data set; 0 without packing.
        notes: What was reported about the data, such as examples that are too long.
        steps: Optimizer steps of the run.
        trained: Trained values in d and b, or in what else the method trains beside the head.
        head: Trained values in the head.
        adapter_bytes: Size of the adapter file.
        peak_memory: Most bytes held in a step on the longest examples, with the loaded model.
        seconds_per_step: Mean duration of an optimizer step.
        train_seconds: Estimated duration of training.
        evaluation_seconds: Estimated duration of all evaluations.
    """

    examples: int
    evaluation_examples: int
    tokens: dict[str, int]
    rows: int
    notes: list[str]
    steps: int
    trained: int
    head: int
    adapter_bytes: int
    peak_memory: int
    seconds_per_step: float
    train_seconds: float
    evaluation_seconds: float


def plan(
    settings: TrainSettings, vera: VeraConfig, on_preview: PreviewCallback | None = None
) -> TrainingPlan:
    """Load data and model, take a few steps, and estimate the whole run. Nothing is kept.

    Args:
        settings: The run; its `out` is checked, and not written.
        vera: The adapter's configuration.
        on_preview: As for `train`.

    Raises:
        UnsupportedError: The task's batches come from the model, so that no data can be measured.
        VeratuneError: As for `train`.
    """
    if settings.task in _OWN_DATA:
        raise UnsupportedError(
            f"plan measures batches of data; those of task {settings.task!r} are sampled from the "
            "model: start the run with --max-steps 3 instead"
        )
    if settings.streaming:
        raise UnsupportedError(
            "plan measures the whole data set, which streaming does not hold; plan without it"
        )
    if settings.out:
        refuse_used(Path(settings.out), "choose another or empty it")
    timer = _Timer()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tried = dataclasses.replace(
            settings, out=folder, resume=False, report_to=[], find_lr=False, ema=0.0, num_workers=0
        )
        run = build_run(
            tried,
            vera,
            mixin=None,
            **MEASURED,
            train_sampling_strategy="sequential",
            max_steps=1 + PROBES,
        )
        notes = [str(found.message) for found in caught if found.filename.startswith(str(_PACKAGE))]
        train = run.data.train
        assert isinstance(train, Dataset)  # streams are refused above
        if on_preview is not None:
            for example in list(train.select(range(min(settings.preview, 1)))):
                on_preview(run.task.preview(example, run.data.processor))
        dataset: Any = run.trainer.train_dataset
        steps = _steps(settings, len(dataset))
        lengths = _lengths(dataset)
        run.trainer.train_dataset = Subset(dataset, _probe_rows(settings, len(dataset), lengths))
        run.trainer.add_callback(timer)
        timer.count(run.trainer)
        run.trainer.train()
        memory = peak_memory()
        method, model = run.trainer.method, run.trainer.adapted
        written = method.write(model, Path(folder) / "file", True)
        evaluation = _evaluation_seconds(run, settings, steps)
    per_step = timer.seconds_per_step(settings, lengths)
    return TrainingPlan(
        examples=len(train),
        evaluation_examples=0 if run.data.evaluation is None else len(run.data.evaluation),
        tokens=_token_statistics(train),
        rows=len(dataset) if isinstance(dataset, PackedDataset) else 0,
        notes=notes,
        steps=steps,
        trained=sum(p.numel() for p in method.adapter_parameters(model)),
        head=sum(p.numel() for p in method.head(model)),
        adapter_bytes=written,
        peak_memory=memory,
        seconds_per_step=per_step,
        train_seconds=steps * per_step,
        evaluation_seconds=evaluation,
    )


class _Timer(TrainerCallback):
    """Times optimizer steps, and counts the padded tokens of their batches."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cells: list[int] = []  # of each batch
        self.start = 0.0

    def count(self, trainer: Any) -> None:
        """Count what the trainer's collator makes from now on."""
        name = "train_collator" if trainer.train_collator is not None else "data_collator"
        collate: Callable[..., Any] = getattr(trainer, name)

        def counted(features: Any) -> Any:
            batch = collate(features)
            self.cells.append(_cells(batch))
            return batch

        setattr(trainer, name, counted)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)

    def seconds_per_step(self, settings: TrainSettings, lengths: Sequence[int]) -> float:
        """The mean step of the run: measured seconds of a padded token times those of a step."""
        timed = self.seconds[1:] or self.seconds  # the first one also allocates and compiles
        passes = settings.gradient_accumulation_steps
        cells = self.cells[passes : passes * len(self.seconds)] or self.cells
        if not lengths or not sum(cells):
            return sum(timed) / len(timed)
        return sum(timed) / sum(cells) * passes * _mean_cells(settings, lengths)


def _cells(batch: Any) -> int:
    ids = batch.get("input_ids") if hasattr(batch, "get") else None
    return int(ids.numel()) if isinstance(ids, torch.Tensor) else 0


def _lengths(dataset: Any) -> list[int]:
    """Tokens of each row of a data set; empty where rows have none."""
    if isinstance(dataset, PackedDataset):
        return [sum(dataset.lengths[i] for i in row) for row in dataset.bins]
    if "input_ids" not in dataset.column_names:
        return []
    return [len(ids) for ids in dataset["input_ids"]]


def _probe_rows(settings: TrainSettings, count: int, lengths: Sequence[int]) -> list[int]:
    """Rows of the steps to take: the longest, and random ones."""
    step = settings.batch_size * settings.gradient_accumulation_steps
    draw = random.Random(settings.seed)
    longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])[:step]
    rows = longest + [i % count for i in range(step - len(longest))]
    return rows + [draw.randrange(count) for _ in range(PROBES * step)]


def _mean_cells(settings: TrainSettings, lengths: Sequence[int]) -> float:
    """Padded tokens of a batch, simulated on the lengths."""
    draw, size = random.Random(settings.seed), min(settings.batch_size, len(lengths))
    if settings.group_by_length:
        return size * sum(lengths) / len(lengths)
    sums = []
    for _ in range(_SIMULATED):
        batch = draw.sample(range(len(lengths)), size)
        chosen = [lengths[i] for i in batch]
        rows = len(best_fit(chosen, max(chosen))) if settings.padding_free else size
        sums.append(rows * max(chosen))
    return sum(sums) / len(sums)


def _steps(settings: TrainSettings, rows: int) -> int:
    if settings.max_steps:
        return settings.max_steps
    batches = math.ceil(rows / settings.batch_size)
    each = math.ceil(batches / settings.gradient_accumulation_steps)
    return math.ceil(settings.epochs * each)


def _evaluation_seconds(run: Run, settings: TrainSettings, steps: int) -> float:
    """Estimated duration of all evaluations: before, after, and at each checkpoint."""
    evaluation = run.data.evaluation
    if evaluation is None:
        return 0.0
    count = min(len(evaluation), 2 * settings.batch_size)
    start = time.perf_counter()
    run.trainer.evaluate(evaluation.select(range(count)))
    seconds = (time.perf_counter() - start) / count * len(evaluation)
    between = steps // settings.save_steps if settings.save_steps else math.ceil(settings.epochs)
    return seconds * (2 + between)


def _token_statistics(dataset: Any) -> dict[str, int]:
    if "input_ids" not in dataset.column_names:
        return {}
    lengths = sorted(len(ids) for ids in dataset["input_ids"])
    found = {
        "min": lengths[0],
        "median": lengths[len(lengths) // 2],
        "p95": lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))],
        "max": lengths[-1],
        "all": sum(lengths),
    }
    if "labels" in dataset.column_names and isinstance(dataset[0]["labels"], list):
        found["trained"] = sum(label != -100 for row in dataset["labels"] for label in row)
    return found


_PACKAGE = Path(__file__).parents[1]
