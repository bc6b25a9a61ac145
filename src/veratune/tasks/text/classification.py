"""Text classification and regression, of one text or a pair, with any encoder or decoder."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import pearsonr, spearmanr
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from veratune.errors import DataError
from veratune.loading import load_pretrained
from veratune.tasks.base import Metrics
from veratune.tasks.classes import (
    class_ids,
    classification_scores,
    label_names,
    logits_of,
    output_heads,
    output_layer,
    set_class_bias,
)
from veratune.tasks.data import pick_columns, small_dataset
from veratune.tasks.text.base import OnOverflow, TextTask


class TextClassification(TextTask):
    """Labels are integers from 0 or names; the names' order is alphabetical and stored with the
    adapter.
    """

    name = "text-classification"
    roles = {
        "text": ("text", "sentence", "sentence1", "question", "premise"),
        "pair": ("text_pair", "sentence2", "hypothesis"),
        "label": ("label", "labels", "target"),
    }
    optional = frozenset({"pair"})
    accepted_settings = TextTask.accepted_settings | {"on_overflow"}
    metric = "accuracy"
    greater_is_better = True
    cross_entropy = True
    needs_labels = True
    head_lr = 1e-2

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        max_length: int = 512,
        labels: list[str] | None = None,
        on_overflow: OnOverflow = "truncate",
    ) -> None:
        """Bind the task to columns and classes.

        Args:
            columns: The data's column for each role with an unusual name.
            max_length: Longest example, in tokens.
            labels: Names of the classes.
            on_overflow: What `encode` does with longer training examples. Evaluation never drops
                one: its scores cover all examples.

        Raises:
            ConfigError: `max_length` or `on_overflow` has an invalid value.
        """
        super().__init__(columns, max_length, on_overflow)
        self.labels = labels or []
        self._new: frozenset[str] = frozenset()  # parameters that the checkpoint does not have

    def fit_labels(self, examples: Dataset) -> None:
        column = pick_columns(examples, self.roles, self.columns, self.optional)["label"]
        self.labels = label_names(examples, column, "use --task text-regression for numbers")

    def to_metadata(self) -> dict[str, Any]:
        return super().to_metadata() | {"labels": self.labels}

    def load_base(self, model: str, **options: Any) -> PreTrainedModel:
        return self._load(model, num_labels=len(self.labels), **options)

    def _load(self, model: str, **options: Any) -> PreTrainedModel:
        loaded: Any = load_pretrained(
            AutoModelForSequenceClassification, model, output_loading_info=True, **options
        )
        self._new = frozenset(loaded[1]["missing_keys"])
        return loaded[0]

    def init_head(self, model: nn.Module, encoded: Dataset) -> None:
        """Start a new head at the log of the class frequencies.

        A head that the checkpoint brings, or one without a bias, keeps its values.
        """
        layer = self._new_output_layer(model, len(self.labels))
        if layer is not None:
            set_class_bias(layer, encoded["labels"])

    def _new_output_layer(self, model: nn.Module, outputs: int) -> nn.Linear | None:
        found = output_layer(model, outputs)
        return found[1] if found is not None and f"{found[0]}.bias" in self._new else None

    def heads(self, model: nn.Module) -> tuple[str, ...]:
        return output_heads(model)

    def encode(
        self, examples: Dataset, processor: PreTrainedTokenizerBase, training: bool = False
    ) -> Dataset:
        columns = pick_columns(examples, self.roles, self.columns, self.optional)
        targets = self._targets(examples, columns["label"])
        texts = [_texts(examples, columns[role]) for role in ("text", "pair") if role in columns]
        encoded = processor(*texts, truncation=True, max_length=self.max_length)
        out = small_dataset({**encoded, "labels": targets})
        lengths = self._overflows(texts, encoded["input_ids"], processor)
        if lengths and self.on_overflow == "fail":
            raise self.overflow_error(*next(iter(lengths.items())))
        action: OnOverflow = "drop" if training and self.on_overflow == "drop" else "truncate"
        self.report_overflows(len(lengths), len(examples), action)
        if action == "drop" and lengths:
            out = out.select([row for row in range(len(out)) if row not in lengths])
        return out

    def _overflows(
        self,
        texts: list[list[str]],
        truncated: list[list[int]],
        processor: PreTrainedTokenizerBase,
    ) -> dict[int, int]:
        """Length in tokens of each example that truncation shortened, by row."""
        rows = [row for row, tokens in enumerate(truncated) if len(tokens) >= self.max_length]
        if not rows:
            return {}
        whole = processor(*[[text[row] for row in rows] for text in texts])["input_ids"]
        lengths = {row: len(tokens) for row, tokens in zip(rows, whole, strict=True)}
        return {row: length for row, length in lengths.items() if length > self.max_length}

    def _targets(self, examples: Dataset, column: str) -> list[Any]:
        return class_ids(examples, column, self.labels)

    def collator(self, processor: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(processor)

    def metrics(self) -> Metrics:
        return classification_scores(len(self.labels))

    def preview(
        self, encoded: Mapping[str, Any], processor: PreTrainedTokenizerBase
    ) -> list[tuple[str, bool]]:
        target = encoded["labels"]
        name = self.labels[target] if self.labels else f"{target:g}"
        return [(str(processor.decode(encoded["input_ids"])), False), (f" -> {name}", True)]


class TextRegression(TextClassification):
    """Labels are numbers; the loss is the mean squared error, the score Pearson's correlation."""

    name = "text-regression"
    roles = {**TextClassification.roles, "label": ("label", "labels", "score", "target")}
    metric = "pearson"
    cross_entropy = False
    needs_labels = False

    def fit_labels(self, examples: Dataset) -> None:
        self.labels = []

    def to_metadata(self) -> dict[str, Any]:
        return TextTask.to_metadata(self)

    def load_base(self, model: str, **options: Any) -> PreTrainedModel:
        return self._load(model, num_labels=1, problem_type="regression", **options)

    def init_head(self, model: nn.Module, encoded: Dataset) -> None:
        """Start a new head at the mean of the targets, in units of their standard deviation s.

        The weight is multiplied by s, and `target_scale` = s makes the run multiply the head's
        learning rate by s and divide the loss by s². AdamW then takes the steps that it would take
        on standardised targets (gradient clipping apart), while the head predicts raw units.
        """
        targets = np.asarray(encoded["labels"], dtype=np.float64)
        spread = float(targets.std())
        layer = self._new_output_layer(model, 1)
        if layer is not None:
            self.target_scale = spread if spread > 0 else 1.0
            with torch.no_grad():
                layer.weight.mul_(self.target_scale)
                layer.bias.fill_(float(targets.mean()))

    def _targets(self, examples: Dataset, column: str) -> list[Any]:
        targets = []
        for row, value in enumerate(examples[column]):
            try:
                targets.append(float(value))
            except (TypeError, ValueError):
                raise DataError(
                    f"row {row}: label {value!r} in column {column!r} is not a number"
                ) from None
            if not np.isfinite(targets[-1]):
                raise DataError(f"row {row}: label {value!r} in column {column!r} is not finite")
        return targets

    def metrics(self) -> Metrics:
        def score(prediction: Any) -> dict[str, float]:
            truth, guess = np.ravel(prediction.label_ids), np.ravel(logits_of(prediction))
            constant = (
                np.ptp(guess) == 0 or np.ptp(truth) == 0
            )  # a correlation with a constant is not defined: count it as 0
            return {
                "pearson": 0.0 if constant else float(pearsonr(truth, guess).statistic),
                "spearman": 0.0 if constant else float(spearmanr(truth, guess).statistic),
                "mse": float(((truth - guess) ** 2).mean()),
            }

        return score


def _texts(examples: Dataset, column: str) -> list[str]:
    texts = list(examples[column])
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"row {row}: column {column!r} holds {text!r}, text is wanted")
    return texts
