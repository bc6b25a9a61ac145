"""Text classification and regression, of one text or a pair, with any encoder or decoder."""

from collections.abc import Mapping
from typing import Any

import numpy as np
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
from veratune.tasks.base import Metrics, TextTask, load_pretrained
from veratune.tasks.classes import (
    class_ids,
    classification_scores,
    label_names,
    logits_of,
    output_heads,
)
from veratune.tasks.data import pick_columns


class TextClassification(TextTask):
    """Labels are integers from 0 or names; the names' order is alphabetical and stored with the adapter."""

    name = "text-classification"
    roles = {
        "text": ("text", "sentence", "sentence1", "question", "premise"),
        "pair": ("text_pair", "sentence2", "hypothesis"),
        "label": ("label", "labels", "target"),
    }
    optional = frozenset({"pair"})
    metric = "accuracy"
    greater_is_better = True
    cross_entropy = True
    needs_labels = True

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        max_length: int = 512,
        labels: list[str] | None = None,
    ) -> None:
        super().__init__(columns, max_length)
        self.labels = labels or []

    def fit_labels(self, examples: Dataset) -> None:
        column = pick_columns(examples, self.roles, self.columns, self.optional)["label"]
        self.labels = label_names(examples, column, "use --task text-regression for numbers")

    def to_metadata(self) -> dict[str, Any]:
        return super().to_metadata() | {"labels": self.labels}

    def load_base(self, model: str, **options: Any) -> PreTrainedModel:
        return load_pretrained(
            AutoModelForSequenceClassification, model, num_labels=len(self.labels), **options
        )

    def heads(self, model: nn.Module) -> tuple[str, ...]:
        return output_heads(model)

    def encode(
        self, examples: Dataset, processor: PreTrainedTokenizerBase, training: bool = False
    ) -> Dataset:
        columns = pick_columns(examples, self.roles, self.columns, self.optional)
        targets = self._targets(examples, columns["label"])
        texts = [_texts(examples, columns[role]) for role in ("text", "pair") if role in columns]
        encoded = processor(*texts, truncation=True, max_length=self.max_length)
        return Dataset.from_dict({**encoded, "labels": targets})

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
        return load_pretrained(
            AutoModelForSequenceClassification,
            model,
            num_labels=1,
            problem_type="regression",
            **options,
        )

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
