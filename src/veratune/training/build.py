"""build_run: a Trainer with its model and data, from settings."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from veratune.config import VeraConfig
from veratune.errors import ConfigError
from veratune.tasks.base import Task
from veratune.tasks.text.base import TextTask
from veratune.training.arguments import training_arguments
from veratune.training.callbacks import EMACallback, ProgressLogger, SampleCallback
from veratune.training.methods import LearningRates, Method, build_method
from veratune.training.packing import PackedDataset, PackingCollator, uses_flash_attention
from veratune.training.prepare import (
    EncodedData,
    build_task,
    check_method_settings,
    load_data,
    load_model,
)
from veratune.training.progress import PROGRESS_FILE, ProgressFileCallback
from veratune.training.run_folder import CHECKPOINTS, check_out, is_first_process, last_checkpoint
from veratune.training.settings import TrainSettings
from veratune.training.trainer import MethodTrainer
from veratune.training.trainer_kind import trainer_kind

# Overrides of a run that is measured: nothing of it is logged, evaluated or kept.
MEASURED: dict[str, Any] = {
    "logging_strategy": "no",
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "disable_tqdm": True,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run that is ready to start.

    Attributes:
        task: What is learnt.
        data: The encoded examples.
        trainer: The Trainer, with the model.
        checkpoint: The checkpoint to resume from; None to start.
    """

    task: Task
    data: EncodedData
    trainer: MethodTrainer
    checkpoint: Path | None


def build_run(
    settings: TrainSettings,
    vera: VeraConfig,
    *,
    task: Task | None = None,
    method: Method | None = None,
    checks_out: bool = False,
    mixin: type | None = None,
    **overrides: Any,
) -> Run:
    """Load data and model, check that the settings fit them, and build the Trainer.

    Args:
        settings: The run.
        vera: The adapter's configuration; its seed is `settings.basis_seed`.
        task: A task object, instead of the one that the settings name.
        method: A method object, instead of the one that the settings name.
        checks_out: Refuse a folder that is in use, or another run's.
        mixin: A class to put before that of the Trainer.
        overrides: Fields of TrainingArguments with other values than the settings give them.

    Raises:
        VeratuneError: A setting, the data or the model is wrong.
    """
    vera = dataclasses.replace(vera, seed=settings.basis_seed)
    out = Path(settings.out)
    task = task or build_task(settings)
    if checks_out and is_first_process():
        check_out(settings, vera)
    if method is None:
        method = build_method(settings.method, vera, settings.options, settings.start_adapter)
        check_method_settings(settings, vera)
    if settings.label_smoothing and not task.cross_entropy:
        raise ConfigError(
            f"label_smoothing is {settings.label_smoothing}, but the loss of task {task.name!r} "
            "is no cross entropy; leave it out"
        )
    data = load_data(settings, task)
    kind = trainer_kind(settings, task)
    arguments = training_arguments(
        settings, task, data.evaluation is not None, kind.arguments, **{**kind.options, **overrides}
    )
    model, frozen_norms = load_model(settings, vera, task, method, data)
    checkpoint = last_checkpoint(out / CHECKPOINTS, method) if settings.resume else None
    head_lr = task.head_lr if settings.head_lr is None else settings.head_lr
    trainer_class: Any = kind.trainer
    if mixin is not None:
        trainer_class = type(mixin.__name__, (mixin, kind.trainer), {})
    trainer: MethodTrainer = trainer_class(
        model=model,
        args=arguments,
        train_collator=_train_collator(settings, data, model),
        train_dataset=_train_dataset(settings, task, data),
        eval_dataset=data.evaluation,
        processing_class=data.processor,
        callbacks=_callbacks(settings, model, task, method, data, checkpoint),
        method=method,
        frozen_norms=frozen_norms,
        rates=LearningRates(settings.lr, head_lr * task.target_scale, settings.b_lr),
        loss_scale=task.target_scale**-2,
        **kind.extras(model, data),
    )
    for callback in (ProgressCallback, PrinterCallback):  # they write to standard output
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressLogger)
    if progress_file := os.environ.get(PROGRESS_FILE):
        trainer.add_callback(ProgressFileCallback(Path(progress_file)))
    return Run(task, data, trainer, checkpoint)


def _train_dataset(
    settings: TrainSettings, task: Task, data: EncodedData
) -> Dataset | IterableDataset | PackedDataset:
    """The training examples, packed where the settings say so."""
    if settings.packing and isinstance(task, TextTask) and isinstance(data.train, Dataset):
        return PackedDataset(data.train, task.max_length)
    return data.train


def _train_collator(
    settings: TrainSettings, data: EncodedData, model: nn.Module
) -> PackingCollator | None:
    """What packs training batches; None where they are padded, as evaluation batches always are."""
    if settings.packing or settings.padding_free:
        return PackingCollator(data.processor.pad_token_id, uses_flash_attention(model))
    return None


def _callbacks(
    settings: TrainSettings,
    model: nn.Module,
    task: Task,
    method: Method,
    data: EncodedData,
    checkpoint: Path | None,
) -> list[TrainerCallback]:
    """The callbacks of a run, in the order in which Trainer calls them."""
    out = Path(settings.out)
    found: list[TrainerCallback] = [SampleCallback(task, model, data.processor, out)]
    found += method.callbacks
    if settings.patience:
        found.append(EarlyStoppingCallback(settings.patience))
    if settings.ema:
        found.append(EMACallback(model, settings.ema, checkpoint))
    return found
