"""TextTask: the tokenizer and the length limit that all tasks on text share."""

import abc
import warnings
from collections.abc import Mapping
from typing import Any, Literal, get_args

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from veratune.errors import ConfigError, DataError
from veratune.loading import loading_errors, pretrained_source
from veratune.tasks.base import Task

OnOverflow = Literal["drop", "truncate", "fail"]


class TextTask(Task):
    """A task on text.

    Attributes:
        max_length: Longest example, in tokens.
        on_overflow: What `encode` does with a longer example.
    """

    accepted_settings = frozenset({"max_length"})

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        max_length: int = 512,
        on_overflow: OnOverflow = "truncate",
    ) -> None:
        """Bind the task to columns and a length.

        Args:
            columns: The data's column for each role with an unusual name.
            max_length: Longest example, in tokens.
            on_overflow: What `encode` does with a longer example.

        Raises:
            ConfigError: `max_length` or `on_overflow` has an invalid value.
        """
        if on_overflow not in get_args(OnOverflow):
            raise ConfigError(
                f"on_overflow is {on_overflow!r}; it must be one of "
                f"{', '.join(get_args(OnOverflow))}"
            )
        if max_length < 1:
            raise ConfigError(f"max_length is {max_length}; it must be at least 1 token")
        super().__init__(columns)
        self.max_length, self.on_overflow = max_length, on_overflow

    def overflow_error(self, row: int, length: int) -> DataError:
        """The error for an example that is longer than `max_length`, in tokens."""
        return DataError(
            f"row {row}: {length} tokens, more than max_length = {self.max_length}; raise "
            "--max-length, shorten the row, or choose --on-overflow drop or truncate"
        )

    def report_overflows(self, count: int, total: int, action: OnOverflow) -> None:
        """Warn that `count` of `total` examples were dropped or truncated.

        Raises:
            DataError: All examples were dropped.
        """
        if not count:
            return
        if count == total and action == "drop":
            raise DataError(
                f"all {total:,} examples have more than max_length = {self.max_length} tokens; "
                "raise --max-length or use --on-overflow truncate"
            )
        done = "dropped" if action == "drop" else "truncated"
        warnings.warn(
            f"{count:,} of {total:,} examples have more than max_length = {self.max_length} tokens "
            f"and were {done}; raise --max-length, or choose --on-overflow drop, truncate or fail",
            stacklevel=3,
        )

    def to_metadata(self) -> dict[str, Any]:
        return super().to_metadata() | {"max_length": self.max_length}

    def load_processor(self, model: str) -> PreTrainedTokenizerBase:
        """Load the tokenizer; without a padding token it gets the end-of-sequence token."""
        with loading_errors(model):
            tokenizer = AutoTokenizer.from_pretrained(**pretrained_source(model))
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
        """Load the base model with this task's output, before its padding token is set."""
