"""detection: boxes on blood cells and on raccoons, with a small detector on pretrained features."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import RTDetrImageProcessorPil

from veratune.config import VeraConfig
from veratune.tasks.vision.detection import ObjectDetection
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
from veratune_lab.paper.networks import plain_padding, small_detector

DATA = {"bccd": ("bccd_detection", "validation"), "raccoon": ("raccoon_detection", "test")}
METHODS: dict[str, dict[str, Any]] = {
    "detector on frozen features": {"method": "head"},
    "LoRA, rank 4": {"method": "peft:lora", "lr": 2e-3, "options": {"r": 4, "lora_alpha": 4}},
    "VeRA, rank 64": {"method": "vera", "lr": 1e-2},
    "full": {"method": "full", "lr": 1e-4},
}


class SmallDetector(ObjectDetection):
    """RT-DETR on EfficientNet-Lite0; all but the pretrained features is trained in full."""

    side = 256

    def __init__(self, plain: bool = False, **options: Any) -> None:
        """plain: take the padding out of the convolutions, for methods that know only plain ones."""
        super().__init__(**options)
        self.plain = plain

    def load_processor(self, model: str) -> Any:
        return RTDetrImageProcessorPil(
            size={"height": self.side, "width": self.side},
            do_normalize=True,
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        )

    def load_model(self, model: str, processor: Any, **options: Any) -> nn.Module:
        return (
            plain_padding(small_detector(self.labels))
            if self.plain
            else small_detector(self.labels)
        )

    def heads(self, model: nn.Module) -> tuple[str, ...]:
        return tuple(
            f"model.{name}"
            for name, child in model.get_submodule("model").named_children()
            if name != "backbone" and list(child.parameters())
        )


class Detection(Experiment):
    name, about = (
        "detection",
        "blood cells (BCCD) and raccoons: an RT-DETR on EfficientNet-Lite0, features adapted or frozen",
    )
    epochs: dict[Scale, int] = {"quick": 1, "scaled": 12, "full": 72}

    def cells(self, scale: Scale) -> list[Cell]:
        data = tuple(DATA) if scale == "full" else ("raccoon",)
        return [
            Cell(
                name=f"{one}: {method}",
                shown={"data": one, "method": method},
                run=functools.partial(self._run, scale, one, method),
            )
            for one in data
            for method in METHODS
        ]

    def _run(
        self, scale: Scale, data: str, method: str, place: Place, seed: int, folder: Path
    ) -> Line:
        name, split = DATA[data]
        source = place.dataset(name)
        settings = {
            "model": "rt-detr-efficientnet-lite0", "data": source, "eval_data": source, "eval_split": split, "batch_size": 8,
            "epochs": self.epochs[scale], "save_steps": 10**6, "keep": "last", "head_lr": 1e-3, "max_grad_norm": 0.5, "weight_decay": 1e-4, **METHODS[method],
        }  # fmt: skip
        lora = method.startswith(
            "LoRA"
        )  # PEFT passes by what these convolutions pad, and refuses depthwise ones
        exclude = ("*_depthwise_conv*",) if lora else ()
        vera = VeraConfig(
            rank=64, targets=("*backbone.model.*conv*", "*backbone.model.stem.0*"), exclude=exclude
        )
        return fine_tune(
            settings,
            vera,
            SmallDetector(lora, augment="flip", bad_boxes="clip"),
            place,
            seed,
            folder,
        )

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        rows = []
        for data in dict.fromkeys(line["data"] for line in lines):
            for method in METHODS:
                own = [line for line in lines if line["data"] == data and line["method"] == method]
                if own:
                    scores = [
                        spread(own, functools.partial(_percent, key))
                        for key in ("map", "map_50", "recall")
                    ]
                    before = spread(own, lambda line: 100 * line["before"]["map"])
                    rows.append([data, method, f"{own[0]['trained']:,}", before, *scores])
        return "\n".join([
            f"# {self.name}: {self.about}", "",
            table(["data", "trained beside the detector's head", "values", "mAP before", "mAP", "mAP at IoU 0.5", "recall"], rows),
            f"Run here ({scale}): images of 256 x 256, {self.epochs[scale]} epochs, batch 8, flipped at random, AdamW, linear decay, the last epoch. "
            "mAP is COCO's, over IoU 0.5 to 0.95, in %, on the validation images of BCCD and the test images of raccoon. The detector's head "
            "(encoder, decoder, class and box layers) starts at random and is trained in full by every method; no detector with pretrained heads "
            "could be had offline, so these figures say which features help, not how good detectors get. LoRA (on the same network with plain padding) leaves out the depthwise convolutions, which PEFT refuses.",
            "",
            measured_on(lines), "",
        ])  # fmt: skip


def _percent(key: str, line: Line) -> float:
    return 100 * line["after"][key]
