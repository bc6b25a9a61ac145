"""Text classification and regression, of one text or a pair, with any encoder or decoder."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from veratune.errors import DataError
from veratune.tasks.base import Metrics, Task, load_pretrained
from veratune.tasks.data import pick_columns


class TextClassification(Task):
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

    def __init__(
        self, columns: Mapping[str, str] | None = None, max_length: int = 512, labels: list[str] | None = None
    ) -> None:
        super().__init__(columns, max_length)
        self.labels = labels or []

    def learn(self, rows: Dataset) -> None:
        column = pick_columns(rows, self.roles, self.columns, self.optional)["label"]
        feature = rows.features[column]
        if hasattr(feature, "names"):
            self.labels = list(feature.names)
            return
        values = set(rows[column])
        if all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            if min(values) < 0:
                raise DataError(f"label {min(values)} in column {column!r} is negative; classes are counted from 0")
            if max(values) >= 10_000:
                raise DataError(f"label {max(values)} in column {column!r} is no class; use --task text-regression for numbers")
            self.labels = [str(i) for i in range(max(2, max(values) + 1))]
        elif all(isinstance(v, str | bool) for v in values):
            self.labels = sorted(str(v) for v in values)
        else:
            kinds = sorted({type(v).__name__ for v in values})
            raise DataError(f"labels in column {column!r} are {' and '.join(kinds)}; use --task text-regression for numbers")
        if len(self.labels) < 2:
            raise DataError(f"all rows have the label {self.labels[0]!r}; at least two classes are wanted")

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"labels": self.labels}

    def load_model(self, model: str, **options: Any) -> PreTrainedModel:
        return load_pretrained(AutoModelForSequenceClassification, model, num_labels=len(self.labels), **options)

    def heads(self, model: nn.Module) -> tuple[str, ...]:
        """What stands beside the backbone: "classifier", "score", a pooler."""
        backbone = getattr(model, "base_model_prefix", "")
        return tuple(
            name for name, child in model.named_children() if name != backbone and any(True for _ in child.parameters())
        )

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        columns = pick_columns(rows, self.roles, self.columns, self.optional)
        targets = self._targets(rows, columns["label"])
        texts = [_texts(rows, columns[role]) for role in ("text", "pair") if role in columns]
        encoded = tokenizer(*texts, truncation=True, max_length=self.max_length)
        return Dataset.from_dict({**encoded, "labels": targets})

    def _targets(self, rows: Dataset, column: str) -> list[Any]:
        index = {name: i for i, name in enumerate(self.labels)}
        targets = []
        for row, value in enumerate(rows[column]):
            found = value if isinstance(value, int) and not isinstance(value, bool) else index.get(str(value), -1)
            if not 0 <= found < len(self.labels):
                raise DataError(f"row {row}: label {value!r} in column {column!r} is none of {', '.join(self.labels[:20])}")
            targets.append(found)
        return targets

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(tokenizer)

    def metrics(self) -> Metrics:
        average = "binary" if len(self.labels) == 2 else "macro"

        def score(prediction: Any) -> dict[str, float]:
            truth, guess = prediction.label_ids, _logits(prediction).argmax(-1)
            return {
                "accuracy": float(accuracy_score(truth, guess)),
                "f1": float(f1_score(truth, guess, average=average, zero_division=0)),
                "matthews": float(matthews_corrcoef(truth, guess)),
            }

        return score

    def preview(self, encoded: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
        target = encoded["labels"]
        name = self.labels[target] if self.labels else f"{target:g}"
        return [(str(tokenizer.decode(encoded["input_ids"])), False), (f" -> {name}", True)]


class TextRegression(TextClassification):
    """Labels are numbers; the loss is the mean squared error, the score Pearson's correlation."""

    name = "text-regression"
    roles = {**TextClassification.roles, "label": ("label", "labels", "score", "target")}
    metric = "pearson"

    def learn(self, rows: Dataset) -> None:
        self.labels = []

    def describe(self) -> dict[str, Any]:
        return Task.describe(self)

    def load_model(self, model: str, **options: Any) -> PreTrainedModel:
        return load_pretrained(AutoModelForSequenceClassification, model, num_labels=1, problem_type="regression", **options)

    def _targets(self, rows: Dataset, column: str) -> list[Any]:
        targets = []
        for row, value in enumerate(rows[column]):
            try:
                targets.append(float(value))
            except (TypeError, ValueError):
                raise DataError(f"row {row}: label {value!r} in column {column!r} is not a number") from None
            if not np.isfinite(targets[-1]):
                raise DataError(f"row {row}: label {value!r} in column {column!r} is not finite")
        return targets

    def metrics(self) -> Metrics:
        def score(prediction: Any) -> dict[str, float]:
            truth, guess = np.ravel(prediction.label_ids), np.ravel(_logits(prediction))
            constant = np.ptp(guess) == 0 or np.ptp(truth) == 0  # a correlation with a constant is not defined: count it as 0
            return {
                "pearson": 0.0 if constant else float(pearsonr(truth, guess).statistic),
                "spearman": 0.0 if constant else float(spearmanr(truth, guess).statistic),
                "mse": float(((truth - guess) ** 2).mean()),
            }

        return score


def _texts(rows: Dataset, column: str) -> list[str]:
    texts = list(rows[column])
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"row {row}: column {column!r} holds {text!r}, text is wanted")
    return texts


def _logits(prediction: Any) -> np.ndarray:
    logits = prediction.predictions
    return np.asarray(logits[0] if isinstance(logits, tuple) else logits)
