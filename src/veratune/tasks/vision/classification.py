"""Image classification, with any Hugging Face model that does it."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from sklearn.metrics import confusion_matrix
from torch import nn
from transformers import AutoModelForImageClassification

from veratune.loading import load_pretrained
from veratune.tasks.base import Metrics
from veratune.tasks.classes import (
    class_ids,
    classification_scores,
    label_names,
    logits_of,
    output_heads,
)
from veratune.tasks.data import pick_columns
from veratune.tasks.vision.images import (
    ImageTask,
    augment_image,
    decode_image,
    stack,
    validate_images,
)


class ImageClassification(ImageTask):
    """Images of any form and size; labels are integers from 0, names, or the folders' names.

    The model's own processor resizes and normalises. After training a confusion matrix is drawn
    into the run's folder.
    """

    name = "image-classification"
    roles = {"image": ("image", "img"), "label": ("label", "labels", "fine_label", "target")}
    metric = "accuracy"
    greater_is_better = True
    cross_entropy = True
    needs_labels = True

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        labels: list[str] | None = None,
        **options: Any,
    ) -> None:
        """labels: names of the classes; options: see `ImageTask`."""
        super().__init__(columns, **options)
        self.labels = labels or []
        self._inputs: dict[str, Any] = {}  # what the model's forward wants beside the pixels
        self._confusion: np.ndarray | None = None

    def fit_labels(self, examples: Dataset) -> None:
        self.labels = label_names(
            examples, pick_columns(examples, self.roles, self.columns)["label"]
        )

    def to_metadata(self) -> dict[str, Any]:
        return super().to_metadata() | {"labels": self.labels}

    def load_model(self, model: str, processor: Any, **options: Any) -> nn.Module:
        names = dict(enumerate(self.labels))
        loaded = load_pretrained(
            AutoModelForImageClassification,
            model,
            id2label=names,
            label2id={v: k for k, v in names.items()},
            ignore_mismatched_sizes=True,
            **options,
        )
        if (
            self.image_size is not None
            and "interpolate_pos_encoding" in inspect.signature(loaded.forward).parameters
        ):
            self._inputs = {"interpolate_pos_encoding": True}
        return loaded

    def heads(self, model: nn.Module) -> tuple[str, ...]:
        return output_heads(model)

    def encode(self, examples: Dataset, processor: Any, training: bool = False) -> Dataset:
        columns = pick_columns(examples, self.roles, self.columns)
        column, how = columns["image"], self.augment if training else "none"
        examples = examples.add_column("_class", class_ids(examples, columns["label"], self.labels))
        examples = validate_images(
            examples.select_columns([column, "_class"]), column, self.bad_images
        )

        def turn(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            images = [
                augment_image(decode_image(value, row), how)
                for row, value in enumerate(batch[column])
            ]
            return {
                "pixel_values": list(processor(images, return_tensors="pt")["pixel_values"]),
                "labels": batch["_class"],
            }

        return examples.with_transform(turn)

    def collator(self, processor: Any) -> Any:
        return lambda batch: stack(batch) | self._inputs

    def metrics(self) -> Metrics:
        score = classification_scores(len(self.labels))

        def scored(prediction: Any) -> dict[str, float]:
            guess = logits_of(prediction).argmax(-1)
            self._confusion = confusion_matrix(
                prediction.label_ids, guess, labels=range(len(self.labels))
            )
            return score(prediction)

        return scored

    def preview(self, encoded: Mapping[str, Any], processor: Any) -> list[tuple[str, bool]]:
        height, width = encoded["pixel_values"].shape[-2:]
        return [
            (f"an image of {width} x {height} pixels", False),
            (f" -> {self.labels[encoded['labels']]}", True),
        ]

    def draw(self, model: nn.Module, examples: Dataset, processor: Any, folder: Path) -> list[Path]:
        """confusion.png: of the last evaluation."""
        if self._confusion is None:
            return []
        from veratune.analysis.pictures import draw_confusion  # matplotlib is slow to import

        return [draw_confusion(self._confusion, self.labels, folder / "confusion.png")]
