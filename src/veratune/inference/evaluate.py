"""Score an adapter, or its base model alone, on examples."""

import functools
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from veratune.errors import UnsupportedError
from veratune.inference.adapted import ADAPTER_NAME, LoadedModel
from veratune.inference.generate import exact_match, generate_completions
from veratune.inference.multimodal import generate_with_images
from veratune.selection import use
from veratune.tasks.multimodal.image_text import ImageTextToText
from veratune.tasks.text.language import ConversationTask, Instruction


class TaskTrainer(Trainer):
    """Trainer that keeps only the model outputs that a task's metrics take.

    Other outputs, such as a detector's hidden states, would fill the memory.
    """

    def __init__(self, *args: Any, outputs: tuple[str, ...] = (), **kwargs: Any) -> None:
        """Build a Trainer.

        Args:
            args: As for Trainer.
            outputs: `Task.outputs`; () keeps all.
            kwargs: As for Trainer.
        """
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


def evaluate(
    loaded: LoadedModel,
    data: str,
    *,
    split: str = "validation",
    data_config: str | None = None,
    batch_size: int = 16,
    generate: bool = False,
    max_new_tokens: int = 128,
) -> dict[str, float]:
    """Compute the task's scores on examples.

    Args:
        loaded: The model, with or without an adapter.
        data: The examples: a file, a folder of splits, or a data set id.
        split: Split of a folder or data set id.
        data_config: Configuration of the data set id.
        batch_size: Examples in one forward pass.
        generate: Also complete every prompt greedily and score exact matches with the last turn
            (tasks instruction and image-text-to-text).
        max_new_tokens: Longest completion, in tokens.

    Returns:
        The scores by name.

    Raises:
        DataError: The data cannot be read or do not fit the task.
        UnsupportedError: `generate` with a task without conversations.
    """
    task = loaded.task
    if generate and not isinstance(task, ConversationTask):
        raise UnsupportedError(f"generate completes conversations; task {task.name!r} has none")
    examples = task.load_examples(data, split, data_config)
    result = _scores(loaded, task.encode(examples, loaded.processor), batch_size)
    if task.loss_per_token:
        result["perplexity"] = math.exp(min(result["loss"], 700.0))
    if generate:
        result["exact_match"] = _exact_match(loaded, examples, max_new_tokens, batch_size)
    return result


def _exact_match(
    loaded: LoadedModel, examples: Dataset, max_new_tokens: int, batch_size: int
) -> float:
    """The share of conversations whose last turn the model generates greedily."""
    task, processor = loaded.task, loaded.processor
    generate: Callable[..., Iterable[str]] = generate_completions
    if isinstance(task, ImageTextToText):
        shown = task.conversations(examples, processor)
        conversations, tokenizer = [example.conversation for example in shown], processor.tokenizer
        images = [example.images for example in shown]
        generate = functools.partial(generate_with_images, images=images)
    else:
        assert isinstance(task, Instruction)
        conversations, tokenizer = task.conversations(examples), processor
    completions = generate(
        loaded.model,
        processor,
        [c.messages[: c.assistant_turns[-1]] for c in conversations],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        tools=[conversation.tools for conversation in conversations],
    )
    return exact_match(completions, task.last_completions(conversations, tokenizer))


def _scores(loaded: LoadedModel, encoded: Dataset, batch_size: int) -> dict[str, float]:
    """Trainer's evaluation of encoded examples, or the task's own."""
    scores = loaded.task.score(loaded.model, encoded, loaded.processor, batch_size)
    if scores is not None:
        return scores
    metrics = loaded.task.metrics()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=batch_size,
            prediction_loss_only=metrics is None,
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
            compute_metrics=metrics,
            outputs=loaded.task.outputs,
        )
        trainer.remove_callback(PrinterCallback)  # it writes to standard output
        return clean_metrics(trainer.evaluate())


def evaluate_with_base(
    loaded: LoadedModel, data: str, **options: Any
) -> tuple[dict[str, float], dict[str, float]]:
    """Compute the scores of the bare base model and of the adapter, in that order.

    Args:
        loaded: The model with its adapter.
        data: The examples, as for `evaluate`.
        options: Other arguments of `evaluate`.
    """
    use(loaded.model, None)
    base = evaluate(loaded, data, **options)
    use(loaded.model, ADAPTER_NAME)
    return base, evaluate(loaded, data, **options)


def clean_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Trainer's metrics without the prefix "eval_" and without timings."""
    timings = (
        "runtime",
        "samples_per_second",
        "steps_per_second",
        "model_preparation_time",
        "epoch",
    )
    named = {k.removeprefix("eval_"): v for k, v in metrics.items()}
    return {k: v for k, v in named.items() if k not in timings}
