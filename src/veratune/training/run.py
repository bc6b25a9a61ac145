"""train: from settings to an adapter file."""

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from transformers.trainer_callback import ProgressCallback

from veratune.config import VeraConfig
from veratune.errors import ConfigError
from veratune.formats.atomic import write_atomic
from veratune.inference.evaluate import clean_metrics
from veratune.tasks.base import Task
from veratune.tasks.text.base import TextTask
from veratune.training.arguments import training_arguments
from veratune.training.callbacks import (
    EMACallback,
    ProgressLogger,
    SampleCallback,
    SigtermCallback,
)
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
from veratune.training.result import TrainResult, peak_memory
from veratune.training.run_folder import (
    BEFORE,
    CHECKPOINTS,
    RESULTS,
    check_out,
    is_first_process,
    last_checkpoint,
    write_settings,
)
from veratune.training.settings import TrainSettings
from veratune.training.trainer import MethodTrainer
from veratune.training.trainer_kind import trainer_kind

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

    All mistakes in settings, data and model are found before anything is written.

    Args:
        settings: The run.
        vera: The adapter's configuration; its seed is `settings.basis_seed`.
        on_preview: Called with each previewed training example: pieces of text, and whether the
            loss is on them.
        task: A task object, instead of the one that the settings name.
        method: A method object, instead of the one that the settings name.

    Returns:
        The result, which is also written to results.json.

    Raises:
        VeratuneError: A setting, the data or the model is wrong, or the run was ended by SIGTERM.
    """
    vera = dataclasses.replace(vera, seed=settings.basis_seed)
    out = Path(settings.out)
    task = task or build_task(settings)
    if is_first_process():
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
    evaluates = data.evaluation is not None
    kind = trainer_kind(settings, task)
    arguments = training_arguments(settings, task, evaluates, kind.arguments, **kind.options)
    model, frozen_norms = load_model(settings, vera, task, method, data)
    if is_first_process():
        write_settings(settings, vera)
        if on_preview is not None:
            for example in itertools.islice(data.train, settings.preview):
                on_preview(task.preview(example, data.processor))

    checkpoint = last_checkpoint(out / CHECKPOINTS, method) if settings.resume else None
    head_lr = task.head_lr if settings.head_lr is None else settings.head_lr
    trainer = kind.trainer(
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
    trainer.remove_callback(ProgressCallback)  # it writes to standard output
    trainer.add_callback(ProgressLogger)
    if progress_file := os.environ.get(PROGRESS_FILE):
        trainer.add_callback(ProgressFileCallback(Path(progress_file)))
    result = _run(trainer, settings, checkpoint)
    if is_first_process():
        write_atomic(out / RESULTS, json.dumps(dataclasses.asdict(result), indent=2).encode())
        if data.eval_examples is not None:
            task.draw(model, data.eval_examples, data.processor, out)
    return result


def _train_dataset(
    settings: TrainSettings, task: Task, data: EncodedData
) -> Dataset | PackedDataset:
    """The training examples, packed where the settings say so."""
    if settings.packing and isinstance(task, TextTask):
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


def _run(trainer: MethodTrainer, settings: TrainSettings, checkpoint: Path | None) -> TrainResult:
    """Evaluate, train, evaluate again, and write the adapter."""
    out, method, model = Path(settings.out), trainer.method, trainer.adapted
    evaluates = trainer.eval_dataset is not None
    before = _scores_before(trainer, out) if evaluates else {}
    set_seed(settings.seed)  # what was drawn so far must not matter to a resumed run
    start = time.perf_counter()
    with SigtermCallback() as sigterm:
        trainer.add_callback(sigterm)
        trained = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        sigterm.raise_if_received(trainer.state.global_step)
    seconds = time.perf_counter() - start
    after = clean_metrics(trainer.evaluate()) if evaluates else {}
    return TrainResult(
        path=str(out / method.file),
        bytes=method.write(model, out, is_first_process()),
        trained=sum(p.numel() for p in method.adapter_parameters(model)),
        head=sum(p.numel() for p in method.head(model)),
        before=before,
        after=after,
        loss=trained.training_loss,
        steps=trainer.state.global_step,
        seconds=seconds,
        peak_memory=peak_memory(),
    )


def _scores_before(trainer: MethodTrainer, out: Path) -> dict[str, float]:
    """The scores before training; a resumed run reads them from its folder."""
    stored = out / BEFORE
    if stored.is_file():
        return json.loads(stored.read_text())
    scores = clean_metrics(trainer.evaluate())
    # Evaluation marks the model as prepared; accelerate would then not wrap it for DDP.
    trainer.adapted.__dict__.pop("_is_accelerate_prepared", None)
    if is_first_process():
        write_atomic(stored, json.dumps(scores).encode())
    return scores
