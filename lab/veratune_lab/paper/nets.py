"""What the vision experiments have in common: image classification with a network of one's own, on some rows of each split."""

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import ViTImageProcessorPil

from veratune.tasks.vision.classification import ImageClassification
from veratune_lab.paper.experiment import some
from veratune_lab.paper.networks import Classifier

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class NetworkTask(ImageClassification):
    """build: the network for so many classes; heads: the modules trained in full, by their path in it; side: of the images, in pixels;
    rows: how many of each split are used, at random but for any seed the same ones; classes: outputs, if more than there are labels.
    """

    def __init__(
        self, build: Callable[[int], nn.Module], heads: Callable[[nn.Module], list[str]], side: int,
        rows: Mapping[str, int] | None = None, classes: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(**options)
        self.build, self.side, self.rows, self.classes, self.find = (
            build,
            side,
            rows or {},
            classes,
            heads,
        )

    def load_examples(
        self, source: str, split: str = "train", config: str | None = None
    ) -> Dataset:
        return some(super().load_examples(source, split, config), self.rows.get(split))

    def load_processor(self, model: str) -> Any:
        mean, std = IMAGENET
        return ViTImageProcessorPil(
            size={"height": self.side, "width": self.side}, image_mean=mean, image_std=std
        )

    def load_model(self, model: str, processor: Any, **options: Any) -> nn.Module:
        return Classifier(self.build(self.classes or len(self.labels)))

    def heads(self, model: nn.Module) -> tuple[str, ...]:
        return tuple(f"net.{path}" for path in self.find(model.get_submodule("net")))
