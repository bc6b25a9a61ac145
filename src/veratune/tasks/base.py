"""Task: what training and evaluation ask of a kind of data, and the base model's loading."""

import abc
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from veratune.errors import ConfigError, DataError, UnsupportedError
from veratune.tasks.data import has_split, load_examples

Quantize = Literal["4bit", "8bit"]
Metrics = Callable[[Any], dict[str, float]]


class Task(abc.ABC):
    """One kind of data, bound to its columns.

    name: as users type it; roles: usual column names by role; optional: roles that may be absent; takes: the
    settings of a run that are this task's own; metric: the score that decides, as Trainer names it;
    greater_is_better: its direction; loss_per_token: whether the model's loss is a mean over the tokens of the whole
    batch, all processes and accumulated passes together; cross_entropy: whether the loss is one, of logits, which can be smoothed; batch_scores: whether `metrics` wants predictions and labels
    as lists of batches, since they cannot be joined; needs_labels: whether a model cannot be built without the names of
    the classes; outputs: those of the model that `metrics` wants, in order; () for all.
    """

    name: ClassVar[str]
    roles: ClassVar[Mapping[str, tuple[str, ...]]]
    optional: ClassVar[frozenset[str]] = frozenset()
    accepted_settings: ClassVar[frozenset[str]] = frozenset()
    metric: ClassVar[str] = "loss"
    greater_is_better: ClassVar[bool] = False
    loss_per_token: ClassVar[bool] = False
    cross_entropy: ClassVar[bool] = False
    batch_scores: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, columns: Mapping[str, str] | None = None) -> None:
        """columns: the data's column for each role that has an unusual name."""
        self.columns = dict(columns or {})

    def load_examples(
        self, source: str, split: str = "train", config: str | None = None
    ) -> Dataset:
        """The rows of one split. Raises DataError; see `veratune.tasks.data.load_examples`."""
        return load_examples(source, split, config)

    def has_split(self, source: str, split: str) -> bool:
        """Whether a folder has rows for a split; asked before an optional split is loaded."""
        return has_split(source, split)

    def fit_labels(self, examples: Dataset) -> None:  # noqa: B027 (most tasks have nothing to learn)
        """Take from the training rows what the model's construction needs, such as the label names."""

    def to_metadata(self) -> dict[str, Any]:
        """What an adapter's file remembers of the task, as JSON types; the inverse of `task_from_metadata`."""
        return {"name": self.name, "columns": self.columns}

    @abc.abstractmethod
    def load_processor(self, model: str) -> Any:
        """What turns rows into a model's inputs: its tokenizer or image processor. Raises DataError if it cannot be had."""

    @abc.abstractmethod
    def load_model(self, model: str, processor: Any, **options: Any) -> nn.Module:
        """The base model with this task's output; `options` as in `load_pretrained`."""

    def heads(self, model: nn.Module) -> tuple[str, ...]:
        """The modules of the output that are trained in full."""
        return ()

    @abc.abstractmethod
    def encode(self, examples: Dataset, processor: Any, training: bool = False) -> Dataset:
        """Rows as inputs and labels; training: with whatever is done to training rows only.

        Raises DataError for a missing column or a bad label.
        """

    @abc.abstractmethod
    def collator(self, processor: Any) -> Any:
        """What makes a batch of encoded rows."""

    def metrics(self) -> Metrics | None:
        """Scores from Trainer's predictions, or None where the loss is all."""
        return None

    @abc.abstractmethod
    def preview(self, encoded: Mapping[str, Any], processor: Any) -> list[tuple[str, bool]]:
        """One encoded example as pieces of text, each with whether the loss is on it."""

    def sample(self, model: nn.Module, processor: Any, path: Path) -> Path | None:
        """A picture of what the model makes in the middle of training, as a PNG file; None for most tasks."""
        return None

    def save(self, model: nn.Module, processor: Any, folder: Path) -> None:
        """Write a whole model, with what it needs to be loaded again."""
        model.save_pretrained(folder)  # type: ignore[operator]
        processor.save_pretrained(folder)

    def draw(self, model: nn.Module, examples: Dataset, processor: Any, folder: Path) -> list[Path]:
        """Pictures of what a trained model does, as PNG files in a folder; none for most tasks."""
        return []


class TextTask(Task):
    """What all tasks on text have in common: a tokenizer, and a length."""

    accepted_settings = frozenset({"max_length"})

    def __init__(self, columns: Mapping[str, str] | None = None, max_length: int = 512) -> None:
        """max_length: tokens an example keeps."""
        if max_length < 1:
            raise ConfigError(f"max_length is {max_length}; it must be at least 1 token")
        super().__init__(columns)
        self.max_length = max_length

    def to_metadata(self) -> dict[str, Any]:
        return super().to_metadata() | {"max_length": self.max_length}

    def load_processor(self, model: str) -> PreTrainedTokenizerBase:
        """The tokenizer, with a padding token."""
        with loading(model):
            tokenizer = AutoTokenizer.from_pretrained(**_source(model))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load_model(
        self, model: str, processor: PreTrainedTokenizerBase, **options: Any
    ) -> PreTrainedModel:
        loaded = self.load_base(model, **options)
        loaded.config.pad_token_id = processor.pad_token_id
        return loaded

    @abc.abstractmethod
    def load_base(self, model: str, **options: Any) -> PreTrainedModel:
        """The base model with this task's output, before it knows the tokenizer."""


def load_pretrained(
    auto: Any, model: str, dtype: str = "float32", quantize: Quantize | None = None, **options: Any
) -> PreTrainedModel:
    """A base model from a folder, a GGUF file or a hub id.

    auto: the transformers Auto class; dtype: of the frozen weights; quantize: bitsandbytes' 4-bit NF4 or 8-bit.
    Raises DataError when it cannot be had.
    """
    extra: dict[str, Any] = {}
    if model.endswith(".gguf"):
        if quantize:
            raise UnsupportedError(
                f"{model} is quantized already; convert it to a folder of safetensors to use --quantize"
            )
        extra["quantization_config"] = GgufConfig(dequantize=True)
    elif quantize == "4bit":
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    elif quantize == "8bit":
        extra["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    with loading(model):
        return auto.from_pretrained(
            **_source(model), dtype=getattr(torch, dtype), **extra, **options
        )


def _source(model: str) -> dict[str, str]:
    if model.endswith(".gguf"):
        path = Path(model)
        if not path.is_file():
            raise DataError(f"{model}: no such file")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": model}


@contextlib.contextmanager
def loading(model: str, config: str = "config.json") -> Any:
    """Make what transformers raises for a model that cannot be had one DataError that says what to do."""
    if Path(model).is_dir() and not (Path(model) / config).is_file():
        raise DataError(
            f"{model}: a folder without {config}; give a folder that save_pretrained wrote"
        )
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        hint = "" if Path(model).exists() else " Without network, pass the path of a local folder."
        raise DataError(f"base model {model!r} cannot be loaded: {reason[:300]}{hint}") from error
