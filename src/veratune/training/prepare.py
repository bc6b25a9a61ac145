"""Preparing a run: checks of its settings, its data, its model, and what stays frozen."""

import dataclasses
import os
import warnings
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import set_seed

from veratune.config import VeraConfig
from veratune.errors import ConfigError, DataError, near
from veratune.targets import find_heads
from veratune.tasks.base import Task
from veratune.tasks.data import stream_examples
from veratune.tasks.registry import task_class
from veratune.training.methods import Method
from veratune.training.packing import check_packing
from veratune.training.settings import TrainSettings

# Fields of VeraConfig that methods other than VeRA read.
_TARGET_FIELDS = frozenset({"targets", "exclude", "layers", "head"})
_HEAD_FIELDS = frozenset({"head"})
_SHUFFLED = 1000  # examples of a stream among which the next one is drawn
_LORA_BASELINES = ("dylora", "lora-fa")


@dataclasses.dataclass(frozen=True)
class EncodedData:
    """A run's data, ready for Trainer.

    Attributes:
        processor: The tokenizer or image processor.
        train: Encoded training examples.
        evaluation: Encoded evaluation examples; None without.
        eval_examples: The same before encoding.
    """

    processor: Any
    train: Dataset | IterableDataset
    evaluation: Dataset | None
    eval_examples: Dataset | None


def build_task(settings: TrainSettings) -> Task:
    """Build the task that the settings name, with the settings that belong to it.

    Raises:
        ConfigError: A setting is set that the task does not read.
    """
    kind, options = task_class(settings.task), settings.task_settings()
    for name in options:
        if name not in kind.accepted_settings:
            raise ConfigError(
                f"{name} is set, but task {settings.task!r} does not take it"
                f"{near(name, kind.accepted_settings)}; leave it out"
            )
    return kind(settings.columns, **options)


def check_method_settings(settings: TrainSettings, vera: VeraConfig) -> None:
    """Refuse settings that the method does not read.

    Raises:
        ConfigError: Names the first such setting.
    """
    method = settings.method
    if method == "vera":
        return
    used = fields_used(method)
    plain = VeraConfig(seed=vera.seed)
    for field in dataclasses.fields(VeraConfig):
        if field.name not in used and getattr(vera, field.name) != getattr(plain, field.name):
            flag = f"--{field.name.replace('_', '-')}"
            hint = " (its rank is --options.r)" if field.name == "rank" and "lora" in method else ""
            raise ConfigError(
                f"{flag} is set, but method {method!r} does not read it{hint}; leave it out"
            )
    if settings.basis_seed:
        raise ConfigError(f"--basis-seed is set, but method {method!r} has no basis; leave it out")


def fields_used(method: str) -> frozenset[str]:
    """The fields of VeraConfig that a method reads."""
    if method == "vera":
        return frozenset(field.name for field in dataclasses.fields(VeraConfig))
    adds_to_targets = method.startswith("peft:") or method in _LORA_BASELINES
    return _TARGET_FIELDS if adds_to_targets else _HEAD_FIELDS


def load_data(settings: TrainSettings, task: Task) -> EncodedData:
    """Load and encode the training and evaluation examples.

    Raises:
        ConfigError: A setting does not fit the data.
        DataError: The data cannot be read or do not fit the task.
    """
    if settings.streaming:
        return _load_stream(settings, task)
    examples, eval_examples = _load_examples(settings, task)
    report_unread_columns(settings, task, examples)
    task.fit_labels(examples)
    processor = task.load_processor(settings.model)
    check_batch_settings(settings, task)
    train = task.encode(examples, processor, training=True)
    if settings.group_by_length and "input_ids" not in train.column_names:
        raise ConfigError(
            f"group_by_length is for texts; examples of task {task.name!r} have no length, "
            "leave it out"
        )
    evaluation = task.encode(eval_examples, processor) if eval_examples is not None else None
    return EncodedData(processor, train, evaluation, eval_examples)


def _load_stream(settings: TrainSettings, task: Task) -> EncodedData:
    """Training examples that are encoded as they are read, and whole evaluation examples."""
    if not task.streams:
        raise ConfigError(
            f"streaming is set, but task {task.name!r} reads its data whole; leave it out"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("streaming trains in one process; leave it out, or start one process")
    stream = stream_examples(settings.data, settings.split, settings.data_config)
    report_unread_columns(settings, task, stream.head)
    check_batch_settings(settings, task)
    processor = task.load_processor(settings.model)
    if next(iter(task.encode_stream(stream, processor)), None) is None:
        raise DataError(
            f"{settings.data}: no example is left within max_length; raise --max-length"
        )
    # Encoded anew: the encoder of a stream may hold the rest of what it has read.
    train = task.encode_stream(stream, processor).shuffle(seed=settings.seed, buffer_size=_SHUFFLED)
    eval_examples = _load_evaluation(settings, task)
    evaluation = task.encode(eval_examples, processor) if eval_examples is not None else None
    return EncodedData(processor, train, evaluation, eval_examples)


def check_batch_settings(settings: TrainSettings, task: Task) -> None:
    """Refuse packing and attention settings that the task does not have.

    Raises:
        ConfigError: Names the first such setting.
    """
    for name in ("packing", "padding_free"):
        if getattr(settings, name) and not task.packs:
            raise ConfigError(
                f"{name} is set, but examples of task {task.name!r} are not packed; leave it out"
            )
    if settings.attn_implementation is not None and not task.transformers_model:
        raise ConfigError(
            f"attn_implementation is set, but the models of task {task.name!r} have no such "
            "choice; leave it out"
        )


def load_model(
    settings: TrainSettings, vera: VeraConfig, task: Task, method: Method, data: EncodedData
) -> tuple[nn.Module, list[nn.Module]]:
    """Load the base model and prepare it for the method.

    Returns:
        The model, and its batch normalisations that stay frozen.

    Raises:
        ConfigError: A setting does not fit the model.
    """
    set_seed(settings.seed)
    attention = (
        {"attn_implementation": settings.attn_implementation}
        if settings.attn_implementation is not None
        else {}
    )
    model = task.load_model(
        settings.model,
        data.processor,
        dtype=settings.base_dtype,
        quantize=settings.quantize,
        **attention,
    )
    if settings.packing or settings.padding_free:
        check_packing(model)
    if isinstance(data.train, Dataset):  # tasks that stream have no head
        task.init_head(model, data.train)
    heads, frozen = split_batch_norms(
        settings, task.backbone(model), vera.head or task.heads(model)
    )
    if settings.head_lr is not None and not heads:
        raise ConfigError(f"--head-lr is set, but task {task.name!r} trains no head; leave it out")
    method.prepare(task.backbone(model), heads, task.to_metadata())
    return model, frozen


def split_batch_norms(
    settings: TrainSettings, model: nn.Module, heads: tuple[str, ...]
) -> tuple[tuple[str, ...], list[nn.Module]]:
    """Split batch normalisations into trained and frozen ones, as `settings.batch_norm` says.

    Args:
        settings: The run.
        model: The base model.
        heads: Paths of the modules that are trained in full.

    Returns:
        The paths that are trained in full, and the modules that stay frozen.

    Raises:
        ConfigError: `batch_norm` is set for a model without batch normalisation.
    """
    norms = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    if not norms and settings.batch_norm is not None:
        raise ConfigError(
            f"batch_norm is {settings.batch_norm!r}, but {type(model).__name__} has no batch "
            "normalisation; leave it out"
        )
    in_heads = {id(module) for _, head in find_heads(model, heads) for module in head.modules()}
    outside = {path: module for path, module in norms.items() if id(module) not in in_heads}
    default = "train" if settings.method == "full" else "frozen"
    if (settings.batch_norm or default) == "frozen":
        return heads, list(outside.values())
    # Full fine-tuning trains and stores these anyway, at the learning rate of all else.
    return (heads if settings.method == "full" else (*heads, *outside)), []


def _load_examples(settings: TrainSettings, task: Task) -> tuple[Dataset, Dataset | None]:
    """Training examples, and evaluation examples if there are any."""
    examples = task.load_examples(settings.data, settings.split, settings.data_config)
    return examples, _load_evaluation(settings, task)


def _load_evaluation(settings: TrainSettings, task: Task) -> Dataset | None:
    """Evaluation examples if there are any."""
    split = settings.eval_split
    if settings.eval_data is not None:
        return task.load_examples(settings.eval_data, split, settings.data_config)
    if task.has_split(settings.data, split):
        return task.load_examples(settings.data, split)
    if settings.patience:
        raise ConfigError(
            "patience stops on an evaluation score, but there is no evaluation data; "
            "give --eval-data"
        )
    return None


def report_unread_columns(settings: TrainSettings, task: Task, examples: Dataset) -> None:
    """Warn about columns that the task does not read and --ignore-columns does not name."""
    columns = examples.column_names
    for name in settings.ignore_columns:
        if name not in columns:
            raise ConfigError(
                f"--ignore-columns names {name!r}; the data has {', '.join(columns)}"
                f"{near(name, columns)}"
            )
    read = task.used_columns(examples)
    both = sorted(read & set(settings.ignore_columns))
    if both:
        raise ConfigError(
            f"--ignore-columns names {both[0]!r}, which task {task.name!r} reads; "
            "leave it out, or give another column with --columns"
        )
    unread = [name for name in columns if name not in read | set(settings.ignore_columns)]
    if unread:
        warnings.warn(
            f"task {task.name!r} reads the columns {', '.join(sorted(read))}, not "
            f"{', '.join(unread)}; give a role with --columns.ROLE NAME, or name them in "
            "--ignore-columns",
            stacklevel=2,
        )
