"""Score an adapter, or its base model alone, on rows of data."""

import dataclasses
import math
import tempfile
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from veratune.adapter import Adapter, install
from veratune.errors import ConfigError, UnsupportedError
from veratune.files import read
from veratune.formats import native
from veratune.formats.hub import download, is_address
from veratune.inference.generate import exact_match, generate_completions
from veratune.selection import use
from veratune.tasks.base import Quantize, Task
from veratune.tasks.registry import task_class, task_from_metadata
from veratune.tasks.text.language import Instruction

ADAPTER_NAME = "default"  # of the adapter that these commands put into a model


class TaskTrainer(Trainer):
    """Trainer that keeps of a model's outputs what a task's metrics want.

    outputs: see Task. Other outputs (a detector's hidden states) would fill the memory.
    """

    def __init__(self, *args: Any, outputs: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.outputs = outputs

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        if not self.outputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            out = model(**inputs)
        return (
            out["loss"].detach().mean(),
            tuple(out[name].detach() for name in self.outputs),
            inputs["labels"],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A base model with an adapter in it (none: the bare model), its tokenizer or image processor, and the adapter's task."""

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
) -> Loaded:
    """A base model and an adapter from disk, ready to be used.

    task: default the one that the adapter's file remembers, else instruction; columns: go before the
    remembered ones. Raises VeratuneError for files that do not fit.
    """
    if adapter is not None and is_address(adapter):
        adapter = str(download(adapter))
    known = (
        native.read(adapter) if adapter is not None and adapter.endswith(native.SUFFIX) else None
    )
    if task is None and known is not None and known.task:
        job = task_from_metadata(known.task)
    else:
        job = task_class(task or Instruction.name)()
    job.columns |= dict(columns or {})
    if job.needs_labels and not getattr(job, "labels", None):
        raise ConfigError(
            f"{job.name} needs the label names, which only an adapter trained by veratune remembers"
        )
    processor = job.load_processor(model)
    base = job.load_model(model, processor, dtype=dtype, quantize=quantize)
    if device == "auto" and torch.cuda.is_available() and quantize is None:
        base.cuda()
    if adapter is not None:
        known = known or read(adapter, base)
        install(base, known, ADAPTER_NAME, check_base=check_base)
    return Loaded(model=base.eval(), processor=processor, task=job, adapter=known)


def evaluate(
    loaded: Loaded,
    data: str,
    *,
    split: str = "validation",
    data_config: str | None = None,
    batch_size: int = 16,
    generate: bool = False,
    max_new_tokens: int = 128,
) -> dict[str, float]:
    """The task's scores on rows of data, in the forms that `load_examples` takes.

    generate: also answer every row greedily and count exact matches with its last turn (task instruction).
    Raises DataError, or UnsupportedError for generate with another task.
    """
    examples = loaded.task.load_examples(data, split, data_config)
    encoded = loaded.task.encode(examples, loaded.processor)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=batch_size,
            prediction_loss_only=loaded.task.metrics() is None,
            eval_do_concat_batches=not loaded.task.batch_scores,
            remove_unused_columns=False,
            report_to=[],
            use_cpu=next(loaded.model.parameters()).device.type == "cpu",
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        trainer = TaskTrainer(
            model=loaded.model,
            args=arguments,
            data_collator=loaded.task.collator(loaded.processor),
            eval_dataset=encoded,
            processing_class=loaded.processor,
            compute_metrics=loaded.task.metrics(),
            outputs=loaded.task.outputs,
        )
        trainer.remove_callback(PrinterCallback)  # it writes to standard output
        result = scores(trainer.evaluate())
    if loaded.task.loss_per_token:
        result["perplexity"] = math.exp(min(result["loss"], 700.0))
    if generate:
        if not isinstance(loaded.task, Instruction):
            raise UnsupportedError(
                f"generate answers conversations; task {loaded.task.name!r} has none"
            )
        conversations = loaded.task.messages(examples)
        answers = generate_completions(
            loaded.model,
            loaded.processor,
            [t[:-1] for t in conversations],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        result["exact_match"] = exact_match(answers, [t[-1]["content"] for t in conversations])
    return result


def evaluate_with_base(
    loaded: Loaded, data: str, **options: Any
) -> tuple[dict[str, float], dict[str, float]]:
    """The scores of the bare base model and of the adapter, in that order."""
    use(loaded.model, None)
    base = evaluate(loaded, data, **options)
    use(loaded.model, ADAPTER_NAME)
    return base, evaluate(loaded, data, **options)


def scores(metrics: Mapping[str, float]) -> dict[str, float]:
    """Trainer's metrics without its prefix and its timings."""
    times = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch")
    named = {k.removeprefix("eval_"): v for k, v in metrics.items()}
    return {k: v for k, v in named.items() if k not in times}
