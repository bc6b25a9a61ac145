"""train: from settings to an adapter's file."""

import dataclasses
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import ProgressCallback

from veratune.config import VeraConfig
from veratune.errors import ConfigError, OutputError, near
from veratune.formats.atomic import refuse_used, write_atomic
from veratune.inference.evaluate import clean_metrics
from veratune.targets import find_heads
from veratune.tasks.base import Task
from veratune.tasks.registry import task_class
from veratune.training.callbacks import EMACallback
from veratune.training.methods import LearningRates, Method, build_method
from veratune.training.progress import PROGRESS_FILE, ProgressFileCallback
from veratune.training.settings import TrainSettings
from veratune.training.trainer import ProgressLogger, SampleCallback, VeraTrainer, last_checkpoint

RUN = "run.yaml"
RESULTS = "results.json"
BEFORE = "before.json"
_FREE = {"resume", "preview", "report_to", "out"}  # settings that may change when a run is resumed


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    path: the adapter's file; bytes: its size; trained: values in d and b (or what else the method trains beside the
    head); head: values trained in the head; before, after: evaluation scores (empty without evaluation data); loss: mean training loss of the run (of
    its resumed part); steps; seconds: of training; peak_memory: bytes, of the process (on a GPU: of the GPU).
    """

    path: str
    bytes: int
    trained: int
    head: int
    before: dict[str, float]
    after: dict[str, float]
    loss: float
    steps: int
    seconds: float
    peak_memory: int


PreviewCallback = Callable[[list[tuple[str, bool]]], None]


def train(
    settings: TrainSettings,
    vera: VeraConfig,
    on_preview: PreviewCallback | None = None,
    *,
    task: Task | None = None,
    method: Method | None = None,
) -> TrainResult:
    """Fine-tune a base model with VeRA and write the adapter to `settings.out`.

    on_preview: called with previews of the first training examples (pieces of text, and whether the loss is on
    them). task, method: objects of one's own, instead of those that the settings name. Raises VeratuneError for every mistake in settings, data or model, before anything is written.
    """
    vera = dataclasses.replace(vera, seed=settings.basis_seed)
    out = Path(settings.out)
    task = task or build_task(settings)
    if settings.head_lr is None:
        settings = dataclasses.replace(settings, head_lr=task.head_lr)
    if _first_process():
        _check_out(settings, vera, out)
    method = method or build_method(settings.method, vera, settings.options)
    if settings.label_smoothing and not task.cross_entropy:
        raise ConfigError(
            f"label_smoothing is {settings.label_smoothing}, but the loss of task {task.name!r} is no cross entropy; leave it out"
        )
    examples, eval_examples = _load_data(settings, task)
    task.fit_labels(examples)
    processor = task.load_processor(settings.model)
    train_set = task.encode(examples, processor, training=True)
    if settings.group_by_length and "input_ids" not in train_set.column_names:
        raise ConfigError(
            f"group_by_length is for texts; examples of task {task.name!r} have no length, leave it out"
        )
    eval_set = task.encode(eval_examples, processor) if eval_examples is not None else None

    set_seed(settings.seed)
    options = {"dtype": settings.base_dtype, "quantize": settings.quantize}
    model = task.load_model(settings.model, processor, **options)
    task.init_head(model, train_set)
    heads, frozen_norms = _norms(settings, model, vera.head or task.heads(model))
    method.prepare(model, heads, task.to_metadata())

    if _first_process():
        _open_out(settings, vera, out)
        if on_preview is not None:
            for example in itertools.islice(train_set, settings.preview):
                on_preview(task.preview(example, processor))
    checkpoint = last_checkpoint(out / "checkpoints", method) if settings.resume else None
    trainer = _trainer(
        settings, model, task, method, processor, train_set, eval_set, frozen_norms, checkpoint
    )
    before = {} if eval_set is None else _before(trainer, out)
    set_seed(settings.seed)  # what was drawn so far must not matter to a resumed run
    start = time.perf_counter()
    trained = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - start
    after = {} if eval_set is None else clean_metrics(trainer.evaluate())
    size = method.write(model, out, _first_process())
    result = TrainResult(
        path=str(out / method.file),
        bytes=size,
        trained=sum(p.numel() for p in method.adapter_parameters(model)),
        head=sum(p.numel() for p in method.head(model)),
        before=before,
        after=after,
        loss=trained.training_loss,
        steps=trainer.state.global_step,
        seconds=seconds,
        peak_memory=peak_memory(),
    )
    if _first_process():
        write_atomic(out / RESULTS, json.dumps(dataclasses.asdict(result), indent=2).encode())
        if eval_examples is not None:
            task.draw(model, eval_examples, processor, out)
    return result


def sweep(
    settings: TrainSettings,
    vera: VeraConfig,
    grid: dict[str, list[Any]],
    on_preview: PreviewCallback | None = None,
) -> list[tuple[dict[str, Any], TrainResult]]:
    """Train once for every combination of values; best first by the task's score.

    grid: values by setting, of TrainSettings or VeraConfig. Each run has a folder of its own in
    `settings.out`; one that is finished already is not trained again. The best adapter is copied to
    `settings.out`. Raises ConfigError for a name that is no setting, or without evaluation data.
    """
    metric, greater = task_class(settings.task).metric, task_class(settings.task).greater_is_better
    known = {f.name for f in dataclasses.fields(TrainSettings)} - _FREE | {
        f.name for f in dataclasses.fields(VeraConfig)
    }
    for name in grid:
        if name not in known:
            raise ConfigError(f"sweep names {name!r}, which is no setting{near(name, known)}")
    if settings.eval_data is None and not build_task(settings).has_split(
        settings.data, settings.eval_split
    ):
        raise ConfigError("a sweep ranks by an evaluation score; give --eval-data")
    out = Path(settings.out)
    results = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        folder = out / "sweep" / ",".join(f"{k}={v}" for k, v in chosen.items()).replace("/", "_")
        finished = folder / RESULTS
        if finished.is_file():
            results.append((chosen, TrainResult(**json.loads(finished.read_text()))))
            continue
        own = {k: v for k, v in chosen.items() if k in settings.to_dict()}
        resumed = (folder / RUN).is_file()
        run = dataclasses.replace(settings, out=str(folder), resume=resumed, **own)
        other = dataclasses.replace(vera, **{k: v for k, v in chosen.items() if k not in own})
        results.append((chosen, train(run, other, None if results else on_preview)))
    results.sort(key=lambda entry: entry[1].after.get(metric, float("nan")), reverse=greater)
    best = Path(results[0][1].path)
    write_atomic(out / best.name, best.read_bytes())
    return results


def build_task(settings: TrainSettings) -> Task:
    """The task with the run's columns and whatever else of the run is its own. Raises ConfigError for what it does not take."""
    kind, options = task_class(settings.task), settings.task_settings()
    for name in options:
        if name not in kind.accepted_settings:
            raise ConfigError(
                f"{name} is set, but task {settings.task!r} does not take it{near(name, kind.accepted_settings)}; leave it out"
            )
    return kind(settings.columns, **options)


def peak_memory() -> int:
    """Bytes: the most that this process (on a GPU: the GPU) has held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _norms(
    settings: TrainSettings, model: nn.Module, heads: tuple[str, ...]
) -> tuple[tuple[str, ...], list[nn.Module]]:
    """What is trained in full, and the batch normalisations that stay frozen, as settings.batch_norm says."""
    norms = {
        p: m for p, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    }
    if not norms and settings.batch_norm is not None:
        raise ConfigError(
            f"batch_norm is {settings.batch_norm!r}, but {type(model).__name__} has no batch normalisation; leave it out"
        )
    inside = {id(module) for _, head in find_heads(model, heads) for module in head.modules()}
    found = {p: m for p, m in norms.items() if id(m) not in inside}
    if (settings.batch_norm or ("train" if settings.method == "full" else "frozen")) == "frozen":
        return heads, list(found.values())
    # Full fine-tuning trains and stores these anyway, at the learning rate of all else.
    return (heads if settings.method == "full" else (*heads, *found)), []


def _load_data(settings: TrainSettings, task: Task) -> tuple[Dataset, Dataset | None]:
    examples = task.load_examples(settings.data, settings.split, settings.data_config)
    if settings.eval_data is not None:
        return examples, task.load_examples(
            settings.eval_data, settings.eval_split, settings.data_config
        )
    if task.has_split(settings.data, settings.eval_split):
        return examples, task.load_examples(settings.data, settings.eval_split)
    if settings.patience:
        raise ConfigError(
            "patience stops on an evaluation score, but there is no evaluation data; give --eval-data"
        )
    return examples, None


def _trainer(
    settings: TrainSettings,
    model: nn.Module,
    task: Task,
    method: Method,
    processor: Any,
    train_set: Dataset,
    eval_set: Dataset | None,
    frozen_norms: list[nn.Module],
    checkpoint: Path | None,
) -> VeraTrainer:
    evaluates, out = eval_set is not None, Path(settings.out)
    head_lr = task.head_lr if settings.head_lr is None else settings.head_lr
    every: dict[str, Any] = {"save_strategy": "epoch"}
    if settings.save_steps:
        every = {"save_strategy": "steps", "save_steps": settings.save_steps}
    if evaluates:
        every |= {
            "eval_strategy": every["save_strategy"],
            "eval_steps": settings.save_steps or None,
        }
    on_gpu = torch.cuda.is_available() and settings.device != "cpu"
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        train_sampling_strategy="group_by_length" if settings.group_by_length else "random",
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps or settings.warmup_ratio,
        save_total_limit=2,
        load_best_model_at_end=evaluates and settings.keep == "best",
        metric_for_best_model=task.metric,
        greater_is_better=task.greater_is_better,
        prediction_loss_only=task.metrics() is None,
        eval_do_concat_batches=not task.batch_scores,
        remove_unused_columns=False,
        logging_steps=10,
        report_to=settings.report_to,
        seed=settings.seed,
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False}
        if settings.gradient_checkpointing
        else None,
        use_cpu=settings.device == "cpu" or not torch.accelerator.is_available(),
        bf16=settings.mixed_precision == "bf16"
        or (settings.mixed_precision == "auto" and settings.base_dtype == "bfloat16" and on_gpu),
        label_smoothing_factor=settings.label_smoothing,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        disable_tqdm=False,
        **every,
    )
    callbacks: list[TrainerCallback] = [
        SampleCallback(task, model, processor, out),
        *method.callbacks,
    ]
    if settings.patience:
        callbacks.append(EarlyStoppingCallback(settings.patience))
    if settings.ema:
        callbacks.append(EMACallback(model, settings.ema, checkpoint))
    trainer = VeraTrainer(
        model=model,
        args=arguments,
        data_collator=task.collator(processor),
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=processor,
        compute_metrics=task.metrics(),
        callbacks=callbacks,
        method=method,
        frozen_norms=frozen_norms,
        loss_per_token=task.loss_per_token,
        outputs=task.outputs,
        rates=LearningRates(settings.lr, head_lr * task.target_scale, settings.b_lr),
        loss_scale=task.target_scale**-2,
    )
    trainer.remove_callback(ProgressCallback)  # it writes to standard output
    trainer.add_callback(ProgressLogger)
    if progress_file := os.environ.get(PROGRESS_FILE):
        trainer.add_callback(ProgressFileCallback(Path(progress_file)))
    return trainer


def _before(trainer: VeraTrainer, out: Path) -> dict[str, float]:
    """The scores before training; a resumed run finds them in its folder."""
    kept = out / BEFORE
    if kept.is_file():
        return json.loads(kept.read_text())
    found = clean_metrics(trainer.evaluate())
    # Evaluation marks the model as prepared, and accelerate would then not wrap it for distributed training.
    trainer.adapted.__dict__.pop("_is_accelerate_prepared", None)
    if _first_process():
        write_atomic(kept, json.dumps(found).encode())
    return found


def _check_out(settings: TrainSettings, vera: VeraConfig, out: Path) -> None:
    """A new run wants an empty folder; a resumed one the settings it was started with."""
    if not settings.resume:
        refuse_used(out, "choose another, empty it, or go on with --resume true")
        return
    run = out / RUN
    if not run.is_file():
        raise OutputError(
            f"{out}: there is no run to resume (no {RUN}); leave --resume out to start one"
        )
    now = _run(settings, vera)
    unsaid = {
        f.name: f.default
        for kind in (TrainSettings, VeraConfig)
        for f in dataclasses.fields(kind)
        if f.name in now
    }
    before = unsaid | yaml.safe_load(
        run.read_text()
    )  # a setting that is newer than the run had its default
    changed = [
        k
        for k in sorted(set(before) | set(now))
        if k not in _FREE | {"head"} and before.get(k) != now.get(k)
    ]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{out}: the run was started with {key} = {before.get(key)!r}, not {now.get(key)!r}; resume it unchanged"
        )


def _open_out(settings: TrainSettings, vera: VeraConfig, out: Path) -> None:
    if not settings.resume:
        write_atomic(out / RUN, yaml.safe_dump(_run(settings, vera), sort_keys=False).encode())


def _run(settings: TrainSettings, vera: VeraConfig) -> dict[str, Any]:
    """The run's settings and the adapter's, flat, as --config reads them."""
    own = {k: v for k, v in vera.to_dict().items() if k not in ("seed", "dtype")}
    return {**{k: v for k, v in settings.to_dict().items() if k not in _FREE}, **own}


def _first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
