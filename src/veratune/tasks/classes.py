"""Classes: their names from training rows, their numbers, their scores, and the part of a model
that tells them apart.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn

from veratune.errors import DataError
from veratune.tasks.base import Metrics


def label_names(
    examples: Dataset, column: str, otherwise: str = "class numbers or names are wanted"
) -> list[str]:
    """The names of the classes: those that the data set declares, integers from 0, or all names in
    alphabetical order.

    otherwise: what an error says to do with values that are no classes. Raises DataError.
    """
    feature = examples.features[column]
    if hasattr(feature, "names"):
        return list(feature.names)
    given = examples[column]
    values = set(given)
    if None in values:
        raise DataError(f"row {given.index(None)}: column {column!r} is empty; a label is wanted")
    if all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        if min(values) < 0:
            raise DataError(
                f"label {min(values)} in column {column!r} is negative; classes are counted from 0"
            )
        if max(values) >= 10_000:
            raise DataError(f"label {max(values)} in column {column!r} is no class; {otherwise}")
        labels = [str(i) for i in range(max(2, max(values) + 1))]
        if len(values) > 1 and sorted(values) == list(range(1, len(values) + 1)):
            raise DataError(
                f"labels in column {column!r} begin at {min(values)}; classes are counted from 0"
            )
    elif all(isinstance(v, str | bool) for v in values):
        labels = sorted(str(v) for v in values)
    else:
        kinds = sorted({type(v).__name__ for v in values})
        raise DataError(f"labels in column {column!r} are {' and '.join(kinds)}; {otherwise}")
    if len(labels) < 2:
        raise DataError(f"all rows have the label {labels[0]!r}; at least two classes are wanted")
    return labels


def class_ids(examples: Dataset, column: str, labels: list[str]) -> list[int]:
    """The class of every row as its place in `labels`. Raises DataError naming the first row of a
    class that is not there.
    """
    index = {name: i for i, name in enumerate(labels)}
    declared = getattr(examples.features[column], "names", None)
    numbers = []
    for row, value in enumerate(examples[column]):
        if declared is not None and 0 <= value < len(
            declared
        ):  # the number is that of this file's own list of names
            value = declared[value]
        found = (
            value
            if isinstance(value, int) and not isinstance(value, bool)
            else index.get(str(value), -1)
        )
        if not 0 <= found < len(labels):
            raise DataError(
                f"row {row}: label {value!r} in column {column!r} is none of "
                f"{', '.join(labels[:20])}"
            )
        numbers.append(found)
    return numbers


def classification_scores(classes: int) -> Metrics:
    """Accuracy, F1 (of class 1, or the mean over three classes and more) and Matthews correlation,
    each from -1 or 0 to 1.
    """
    average = "binary" if classes == 2 else "macro"

    def score(prediction: Any) -> dict[str, float]:
        truth, guess = prediction.label_ids, logits_of(prediction).argmax(-1)
        return {
            "accuracy": float(accuracy_score(truth, guess)),
            "f1": float(f1_score(truth, guess, average=average, zero_division=0)),
            "matthews": float(matthews_corrcoef(truth, guess)),
        }

    return score


def logits_of(prediction: Any) -> np.ndarray:
    """The logits among a model's outputs."""
    logits = prediction.predictions
    return np.asarray(logits[0] if isinstance(logits, tuple) else logits)


def output_layer(model: nn.Module, outputs: int) -> tuple[str, nn.Linear] | None:
    """The path and the module of the head's last linear layer with so many outputs; None without
    one.
    """
    found = None
    for head in output_heads(model):
        for name, module in model.get_submodule(head).named_modules(prefix=head):
            if isinstance(module, nn.Linear) and module.out_features == outputs:
                found = name, module
    return found


def set_class_bias(layer: nn.Linear, targets: Sequence[int]) -> None:
    """Set a classifier's bias to the log of the class frequencies: the best constant prediction.

    A class without any row counts as half a row, so that its bias is finite.

    Args:
        layer: The output layer, with a bias of shape (classes,).
        targets: The class index of each training row.
    """
    counts = torch.bincount(torch.as_tensor(targets), minlength=layer.out_features)
    frequencies = counts.double().clamp_min(0.5) / max(len(targets), 1)
    with torch.no_grad():
        layer.bias.copy_(frequencies.log())


def output_heads(model: nn.Module) -> tuple[str, ...]:
    """Modules with parameters beside a Hugging Face model's backbone: a classifier, a pooler."""
    backbone = getattr(model, "base_model_prefix", "")
    return tuple(
        name
        for name, child in model.named_children()
        if name != backbone and any(True for _ in child.parameters())
    )
