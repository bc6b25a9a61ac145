"""Task: the interface between a kind of data and the training and evaluation loops."""

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, IterableDataset
from torch import nn

from veratune.errors import ConfigError
from veratune.tasks.data import Stream, has_split, load_examples, pick_columns

TEMPLATE_HASH = "chat_template_sha256"  # of the tokenizer's chat template, in a task's metadata

Metrics = Callable[[Any], dict[str, float]]


class Task(abc.ABC):
    """One kind of data: it loads examples, encodes them and scores predictions.

    Attributes:
        name: The name that users type.
        roles: Usual column names of each role. A role's own name is always one of them.
        optional: Roles that may be absent.
        accepted_settings: Fields of TrainSettings that belong to this task alone.
        metric: The score that ranks models, as Trainer names it.
        greater_is_better: Whether a higher `metric` is better.
        loss_per_token: Whether the model's loss is a mean over the tokens of the whole batch, over
            all processes and accumulated passes.
        cross_entropy: Whether the loss is a cross entropy of logits, which can be label-smoothed.
        batch_scores: Whether `metrics` takes lists of batches, which cannot be concatenated.
        packs: Whether examples can share a row of a batch, as `--packing` has them.
        streams: Whether examples can be encoded as they are read, as `--streaming` has them.
        transformers_model: Whether the base model takes transformers' choice of attention.
        needs_labels: Whether the model cannot be built without the class names.
        outputs: The model outputs that `metrics` takes, in order; () for all.
        head_lr: Default peak learning rate of the head.
        target_scale: Standard deviation of the training targets; see `init_head`.
        columns: The data's column for each role with an unusual name.
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
    packs: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    transformers_model: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ()
    head_lr: ClassVar[float] = 1e-3
    target_scale: float = 1.0

    def __init__(self, columns: Mapping[str, str] | None = None) -> None:
        """Bind the task to columns of the data.

        Args:
            columns: The data's column for each role with an unusual name.
        """
        self.columns = dict(columns or {})

    def load_examples(
        self, source: str, split: str = "train", config: str | None = None
    ) -> Dataset:
        """Load the examples of one split; see `veratune.tasks.data.load_examples`.

        Raises:
            DataError: The data cannot be found or read.
        """
        return load_examples(source, split, config)

    def used_columns(self, examples: Dataset) -> set[str]:
        """The columns of the data that `encode` reads.

        Raises:
            DataError: A column is missing.
        """
        return set(pick_columns(examples, self.roles, self.columns, self.optional).values())

    def has_split(self, source: str, split: str) -> bool:
        """Whether a folder holds a split. Ask before loading an optional one."""
        return has_split(source, split)

    def fit_labels(self, examples: Dataset) -> None:  # noqa: B027 (most tasks have no labels)
        """Read from the training examples what building the model needs, such as class names."""

    def to_metadata(self) -> dict[str, Any]:
        """The task as JSON types, for an adapter file; the inverse of `task_from_metadata`."""
        return {"name": self.name, "columns": self.columns}

    @abc.abstractmethod
    def load_processor(self, model: str) -> Any:
        """Load the base model's tokenizer or image processor.

        Raises:
            DataError: It cannot be loaded.
        """

    @abc.abstractmethod
    def load_model(self, model: str, processor: Any, **options: Any) -> nn.Module:
        """Load the base model with this task's output; `options` as in `load_pretrained`."""

    def backbone(self, model: nn.Module) -> nn.Module:
        """The module that gets the adapter: the model, or the one that it wraps."""
        return model

    def heads(self, model: nn.Module) -> tuple[str, ...]:
        """Paths of the output modules that are trained in full."""
        return ()

    def init_head(self, model: nn.Module, encoded: Dataset) -> None:  # noqa: B027
        """Set a new head's starting values from the training labels.

        Args:
            model: The base model with this task's head, as `load_model` returned it.
            encoded: The training rows, as `encode` returned them.
        """

    @abc.abstractmethod
    def encode(self, examples: Dataset, processor: Any, training: bool = False) -> Dataset:
        """Turn examples into model inputs and labels.

        Args:
            examples: The examples, with their columns.
            processor: The tokenizer or image processor.
            training: Whether these are training examples, which are augmented.

        Returns:
            The encoded examples.

        Raises:
            DataError: A column is missing or a label is invalid.
        """

    def encode_stream(self, stream: Stream, processor: Any) -> IterableDataset:
        """Turn rows into model inputs and labels as they are read, in their order.

        Args:
            stream: The rows.
            processor: The tokenizer.

        Raises:
            ConfigError: The task does not stream.
            DataError: Also while the examples are read: a row is invalid.
        """
        raise ConfigError(
            f"streaming is set, but task {self.name!r} reads its data whole; leave it out"
        )

    @abc.abstractmethod
    def collator(self, processor: Any) -> Any:
        """The function that makes a batch of encoded examples."""

    def metrics(self) -> Metrics | None:
        """The function that scores Trainer's predictions; None where the loss is the score."""
        return None

    def score(
        self, model: nn.Module, encoded: Dataset, processor: Any, batch_size: int
    ) -> dict[str, float] | None:
        """Score encoded examples where Trainer's evaluation cannot; None where it can.

        Args:
            model: The model.
            encoded: From `encode`.
            processor: The tokenizer or image processor.
            batch_size: Examples in one forward pass.
        """
        return None

    @abc.abstractmethod
    def preview(self, encoded: Mapping[str, Any], processor: Any) -> list[tuple[str, bool]]:
        """One encoded example as pieces of text, each with whether the loss is on it."""

    def sample(self, model: nn.Module, processor: Any, path: Path) -> Path | None:
        """Draw samples of a model during training into a PNG file; None for most tasks."""
        return None

    def save(self, model: nn.Module, processor: Any, folder: Path) -> None:
        """Write a whole model and its processor so that `from_pretrained` loads them."""
        model.save_pretrained(folder)  # type: ignore[operator]
        processor.save_pretrained(folder)

    def draw(self, model: nn.Module, examples: Dataset, processor: Any, folder: Path) -> list[Path]:
        """Draw a trained model's results as PNG files; none for most tasks."""
        return []
