"""TrainingArguments of transformers from a run's settings."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from veratune.errors import ConfigError
from veratune.tasks.base import Task
from veratune.training.run_folder import CHECKPOINTS
from veratune.training.settings import TrainSettings


def training_arguments(
    settings: TrainSettings,
    task: Task,
    evaluates: bool,
    kind: type[TrainingArguments] = TrainingArguments,
    **more: Any,
) -> TrainingArguments:
    """Translate a run's settings for Trainer.

    Args:
        settings: The run.
        task: Its task.
        evaluates: Whether there is evaluation data.
        kind: The class of arguments, such as one of TRL's.
        more: Arguments of that class alone; they overrule the others.

    Raises:
        ConfigError: `keep` is "best" without evaluation data, or fp16 without a GPU.
    """
    on_gpu = torch.cuda.is_available() and settings.device != "cpu"
    recompute = settings.gradient_checkpointing
    if settings.mixed_precision == "fp16" and not on_gpu:
        raise ConfigError(
            "mixed_precision is 'fp16', which needs a GPU; on a CPU use bf16, or leave it out"
        )
    arguments: dict[str, Any] = dict(
        output_dir=str(Path(settings.out) / CHECKPOINTS),
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
        prediction_loss_only=task.metrics() is None,
        eval_do_concat_batches=not task.batch_scores,
        remove_unused_columns=False,
        logging_steps=10,
        report_to=settings.report_to,
        seed=settings.seed,
        activation_checkpointing=recompute,
        activation_checkpointing_kwargs={"use_reentrant": False} if recompute else None,
        use_cpu=settings.device == "cpu" or not torch.accelerator.is_available(),
        bf16=settings.mixed_precision == "bf16"
        or (settings.mixed_precision == "auto" and settings.base_dtype == "bfloat16" and on_gpu),
        fp16=settings.mixed_precision == "fp16",
        dataloader_num_workers=settings.num_workers,
        label_smoothing_factor=settings.label_smoothing,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        disable_tqdm=False,
        **_checkpointing(settings, task, evaluates),
    )
    return kind(**arguments | more)


def _checkpointing(settings: TrainSettings, task: Task, evaluates: bool) -> dict[str, Any]:
    """When to save and evaluate, and which checkpoint to keep."""
    if settings.keep == "best" and not evaluates:
        raise ConfigError(
            "keep is 'best', but there is no evaluation data; give --eval-data or leave keep out"
        )
    keep = settings.keep or ("best" if evaluates and not settings.ema else "last")
    every: dict[str, Any] = {"save_strategy": "epoch"}
    if settings.save_steps:
        every = {"save_strategy": "steps", "save_steps": settings.save_steps}
    if evaluates:
        every["eval_strategy"] = every["save_strategy"]
        every["eval_steps"] = settings.save_steps or None
    return every | {
        "save_total_limit": 2,
        "load_best_model_at_end": keep == "best",
        "metric_for_best_model": task.metric,
        "greater_is_better": task.greater_is_better,
    }
