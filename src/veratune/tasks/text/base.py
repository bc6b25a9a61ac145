"""TextTask: the tokenizer and the length limit that all tasks on text share."""

import abc
from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from veratune.errors import ConfigError
from veratune.loading import loading_errors, pretrained_source
from veratune.tasks.base import Task


class TextTask(Task):
    """A task on text.

    Attributes:
        max_length: Longest example, in tokens.
    """

    accepted_settings = frozenset({"max_length"})

    def __init__(self, columns: Mapping[str, str] | None = None, max_length: int = 512) -> None:
        """Bind the task to columns and a length.

        Args:
            columns: The data's column for each role with an unusual name.
            max_length: Longest example, in tokens.

        Raises:
            ConfigError: `max_length` is below 1.
        """
        if max_length < 1:
            raise ConfigError(f"max_length is {max_length}; it must be at least 1 token")
        super().__init__(columns)
        self.max_length = max_length

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
