"""A base model with an adapter in it, ready for inference."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch

from veratune.adapter import Adapter, install
from veratune.errors import ConfigError
from veratune.files import read
from veratune.formats import native
from veratune.formats.hub import download, is_address
from veratune.loading import Quantize
from veratune.tasks.base import Task
from veratune.tasks.registry import task_class, task_from_metadata
from veratune.tasks.text.language import Instruction

ADAPTER_NAME = "default"  # the adapter's name in a model that a command loaded


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A base model with an adapter in it.

    Attributes:
        model: The model, in evaluation mode.
        processor: Its tokenizer or image processor.
        task: The adapter's task.
        adapter: The adapter; None for the bare base model.
    """

    model: Any
    processor: Any
    task: Task
    adapter: Adapter | None


def load_with_adapter(
    model: str,
    adapter: str | None,
    *,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    dtype: str = "float32",
    quantize: Quantize | None = None,
    check_base: bool = True,
    device: Literal["auto", "cpu"] = "auto",
) -> LoadedModel:
    """Load a base model and put an adapter into it.

    Args:
        model: The base model: a folder, a .gguf file, or a hub id.
        adapter: An adapter file or the folder of a PEFT checkpoint; None for the bare base model.
        task: The task's name. Default: the one in the adapter's file, else instruction.
        columns: The data's column for each role; they overrule those in the adapter's file.
        dtype: Dtype of the base weights, by its name in torch.
        quantize: Load the base with bitsandbytes in 4 or 8 bits.
        check_base: Refuse an adapter that was trained on other base weights.
        device: "auto" takes a GPU if there is one.

    Returns:
        The model with everything that inference needs.

    Raises:
        VeratuneError: A file is missing or broken, or the adapter does not fit the model.
    """
    if adapter is not None and is_address(adapter):
        adapter = str(download(adapter))
    is_native = adapter is not None and adapter.endswith(native.SUFFIX)
    stored = native.read(adapter) if adapter is not None and is_native else None
    if task is None and stored is not None and stored.task:
        job = task_from_metadata(stored.task)
    else:
        job = task_class(task or Instruction.name)()
    job.columns |= dict(columns or {})
    if job.needs_labels and not getattr(job, "labels", None):
        raise ConfigError(
            f"{job.name} needs the label names, which only an adapter trained by veratune remembers"
        )
    processor = job.load_processor(model)
    base: Any = job.load_model(model, processor, dtype=dtype, quantize=quantize)
    if device == "auto" and torch.cuda.is_available() and quantize is None:
        base.cuda()
    if adapter is not None:
        stored = stored or read(adapter, job.backbone(base))
        install(job.backbone(base), stored, ADAPTER_NAME, check_base=check_base)
    return LoadedModel(model=base.eval(), processor=processor, task=job, adapter=stored)
