"""Object detection with Hugging Face's detectors: DETR and its family, YOLOS, RT-DETR, D-FINE."""

import contextlib
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import ImageOps
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection

from veratune.errors import ConfigError, DataError
from veratune.loading import load_pretrained
from veratune.tasks.base import Metrics
from veratune.tasks.classes import output_heads
from veratune.tasks.data import pick_columns
from veratune.tasks.vision.boxes import BadBoxes, has_box_split, load_box_examples, validate_boxes
from veratune.tasks.vision.images import ImageTask, decode_image, validate_images_with_sizes

_DRAWN = 6  # images with boxes, drawn after training


class ObjectDetection(ImageTask):
    """Images with boxes and their classes. The score is COCO's mean average precision, through
    pycocotools.

    What the base model's checkpoint lacks (class and box layers of another number of classes) is
    trained in full. After training some evaluation images are drawn with the boxes that were found.
    """

    name = "object-detection"
    roles = {
        "image": ("image", "img"),
        "boxes": ("boxes", "bboxes"),
        "label": ("labels", "label", "categories"),
    }
    accepted_settings = ImageTask.accepted_settings | {"bad_boxes"}
    augments = ("none", "flip")  # a crop would cut boxes
    metric = "map"
    greater_is_better = True
    needs_labels = True
    batch_scores = True
    outputs = ("logits", "pred_boxes")

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        bad_boxes: BadBoxes = "fail",
        labels: list[str] | None = None,
        **options: Any,
    ) -> None:
        """bad_boxes: see `TrainSettings`; labels: names of the classes; options: see
        `ImageTask`.
        """
        super().__init__(columns, **options)
        if bad_boxes not in ("fail", "clip"):
            raise ConfigError(f"bad_boxes is {bad_boxes!r}; it must be one of fail, clip")
        self.bad_boxes, self.labels = bad_boxes, labels or []
        self._fresh: tuple[str, ...] = ()
        self._processor: Any = None

    def load_examples(
        self, source: str, split: str = "train", config: str | None = None
    ) -> Dataset:
        return load_box_examples(source, split, config)

    def has_split(self, source: str, split: str) -> bool:
        return has_box_split(source, split)

    def fit_labels(self, examples: Dataset) -> None:
        column = pick_columns(examples, self.roles, self.columns)["label"]
        found = {label for labels in examples[column] for label in labels}
        if not found:
            raise DataError(
                f"column {column!r} names no object in any row; at least one class is wanted"
            )
        if all(isinstance(label, int) for label in found):
            self.labels = [str(i) for i in range(max(found) + 1)]
        else:
            self.labels = sorted(map(str, found))

    def to_metadata(self) -> dict[str, Any]:
        return super().to_metadata() | {"labels": self.labels}

    def load_model(self, model: str, processor: Any, **options: Any) -> nn.Module:
        names = dict(enumerate(self.labels))
        loaded: Any = load_pretrained(
            AutoModelForObjectDetection,
            model,
            id2label=names,
            label2id={v: k for k, v in names.items()},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
        network, report = loaded
        fresh = [*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])]
        self._fresh = tuple(sorted({key.rpartition(".")[0] for key in fresh}))
        return network

    def heads(self, model: nn.Module) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*output_heads(model), *self._fresh)))

    def encode(self, examples: Dataset, processor: Any, training: bool = False) -> Dataset:
        columns = pick_columns(examples, self.roles, self.columns)
        column, flips = columns["image"], training and self.augment == "flip"
        examples, sizes = validate_images_with_sizes(
            examples.select_columns(list(columns.values())), column, self.bad_images
        )
        index = {name: i for i, name in enumerate(self.labels)}
        clean: dict[str, list[Any]] = {"_boxes": [], "_classes": []}
        for row, ((width, height), boxes, labels) in enumerate(
            zip(sizes, examples[columns["boxes"]], examples[columns["label"]], strict=True)
        ):
            kept, names = validate_boxes(boxes, labels, width, height, row, self.bad_boxes)
            unknown = next((name for name in names if str(name) not in index), None)
            if unknown is not None:
                raise DataError(
                    f"row {row}: class {unknown!r} is none of {', '.join(self.labels[:20])}, the "
                    "classes of the training rows"
                )
            clean["_boxes"].append(kept)
            clean["_classes"].append([index[str(name)] for name in names])
        examples = (
            examples.select_columns([column])
            .add_column("_boxes", clean["_boxes"])
            .add_column("_classes", clean["_classes"])
        )
        self._processor = processor

        def turn(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            images, notes = [], []
            for row, (value, boxes, classes) in enumerate(
                zip(batch[column], batch["_boxes"], batch["_classes"], strict=True)
            ):
                image = decode_image(value, row)
                if flips and torch.rand(()).item() < 0.5:
                    image, boxes = (
                        ImageOps.mirror(image),
                        [[image.width - x1, y0, image.width - x0, y1] for x0, y0, x1, y1 in boxes],
                    )
                images.append(image)
                notes.append(
                    {
                        "image_id": row,
                        "annotations": [
                            _coco_note(b, c) for b, c in zip(boxes, classes, strict=True)
                        ],
                    }
                )
            inputs = processor(images=images, annotations=notes, return_tensors="pt")
            return {
                key: list(inputs[key])
                for key in ("pixel_values", "pixel_mask", "labels")
                if key in inputs
            }

        return examples.with_transform(turn)

    def collator(self, processor: Any) -> Any:
        def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
            labels = [
                {key: torch.as_tensor(value) for key, value in row["labels"].items()}
                for row in batch
            ]
            tensors = {
                key: torch.stack([row[key] for row in batch]) for key in batch[0] if key != "labels"
            }
            return tensors | {"labels": labels}

        return collate

    def metrics(self) -> Metrics:
        def score(prediction: Any) -> dict[str, float]:
            truth, found = [], []
            for outputs, labels in zip(prediction.predictions, prediction.label_ids, strict=True):
                sizes = [
                    (int(label["orig_size"][0]), int(label["orig_size"][1])) for label in labels
                ]
                for label, (height, width) in zip(labels, sizes, strict=True):
                    truth.append(
                        (
                            _corners(np.asarray(label["boxes"]), width, height),
                            np.asarray(label["class_labels"]),
                        )
                    )
                found += self.found(
                    torch.as_tensor(outputs[0]), torch.as_tensor(outputs[1]), sizes, 0.0
                )
            return mean_average_precision(truth, found, self.labels)

        return score

    def found(
        self, logits: Tensor, boxes: Tensor, sizes: list[tuple[int, int]], threshold: float
    ) -> list[dict[str, np.ndarray]]:
        """Detections in each image of a batch: boxes (x0, y0, x1, y1), labels, scores.

        sizes: (height, width) in pixels that the boxes are given in.
        """
        outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
        results = self._processor.post_process_object_detection(
            outputs, threshold=threshold, target_sizes=sizes
        )
        return [
            {key: value.detach().cpu().float().numpy() for key, value in one.items()}
            for one in results
        ]

    def preview(self, encoded: Mapping[str, Any], processor: Any) -> list[tuple[str, bool]]:
        height, width = encoded["pixel_values"].shape[-2:]
        names = [self.labels[int(c)] for c in encoded["labels"]["class_labels"]]
        return [
            (f"an image of {width} x {height} pixels with {len(names)} boxes", False),
            (f" -> {', '.join(names)}", True),
        ]

    @torch.no_grad()
    def draw(self, model: nn.Module, examples: Dataset, processor: Any, folder: Path) -> list[Path]:
        """boxes.png: evaluation images with the boxes that are there and those that were found
        (score over 0.3).
        """
        from veratune.analysis.pictures import draw_grid, with_boxes  # matplotlib is slow to import

        encoded = self.encode(examples.select(range(min(_DRAWN, len(examples)))), processor)
        was = model.training
        model.eval()
        device = next(model.parameters()).device
        real, guessed = [], []
        for i in range(len(encoded)):
            one = encoded[i]
            batch = self.collator(processor)([one])
            out = model(
                **{key: value.to(device) for key, value in batch.items() if key != "labels"}
            )
            raw = encoded.with_format(None)[i]
            image = decode_image(next(iter(raw.values())), i)
            # The frame of the boxes is what the model saw, padding included.
            seen, resized = batch["pixel_values"].shape[-2:], one["labels"]["size"]
            frame = [
                (
                    round(seen[0] * image.height / int(resized[0])),
                    round(seen[1] * image.width / int(resized[1])),
                )
            ]
            (result,) = self.found(out["logits"], out["pred_boxes"], frame, 0.3)
            scale = 260 / image.height
            small = image.resize((round(image.width * scale), 260))
            real.append(
                with_boxes(
                    small,
                    [[v * scale for v in box] for box in raw["_boxes"]],
                    raw["_classes"],
                    self.labels,
                )
            )
            kinds = [int(kind) for kind in result["labels"]]
            guessed.append(
                with_boxes(
                    small,
                    (result["boxes"] * scale).tolist(),
                    kinds,
                    self.labels,
                    result["scores"].tolist(),
                )
            )
        model.train(was)
        return [draw_grid({"annotated": real, "found": guessed}, folder / "boxes.png")]


def mean_average_precision(
    truth: list[tuple[np.ndarray, np.ndarray]],
    found: list[dict[str, np.ndarray]],
    labels: list[str],
) -> dict[str, float]:
    """COCO's mAP (over IoU 0.5 to 0.95), at IoU 0.5 and 0.75, and its recall with 100 boxes; by
    pycocotools.

    truth: (boxes, classes) of each image; found: {boxes, labels, scores} of each image; boxes x0,
    y0, x1, y1.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    notes: list[dict[str, Any]] = []
    for i, (boxes, classes) in enumerate(truth):
        for box, kind in zip(boxes, classes, strict=True):
            notes.append(_coco_note(box, int(kind)) | {"image_id": i, "id": len(notes) + 1})
    results = []
    for i, one in enumerate(found):
        for box, kind, value in zip(one["boxes"], one["labels"], one["scores"], strict=True):
            if 0 <= int(kind) < len(labels):
                results.append(
                    {
                        "image_id": i,
                        "category_id": int(kind),
                        "bbox": _coco_note(box, 0)["bbox"],
                        "score": float(value),
                    }
                )
    if not results or not notes:
        return dict.fromkeys(("map", "map_50", "map_75", "recall"), 0.0)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i} for i in range(len(truth))],
            "annotations": notes,
            "categories": [{"id": i, "name": name} for i, name in enumerate(labels)],
        }
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {
        name: max(0.0, float(judge.stats[i]))
        for name, i in (("map", 0), ("map_50", 1), ("map_75", 2), ("recall", 8))
    }


def _coco_note(box: Any, kind: int) -> dict[str, Any]:
    x0, y0, x1, y1 = (float(v) for v in box)
    return {
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": (x1 - x0) * (y1 - y0),
        "category_id": kind,
        "iscrowd": 0,
    }


def _corners(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """(center x, center y, width, height) in shares of the image to corners in pixels. Shares of a
    padded image stay shares of it: IoU does not change with the scale of an axis.
    """
    boxes = boxes.reshape(-1, 4)
    half = boxes[:, 2:] / 2
    return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], 1) * np.asarray(
        [width, height, width, height]
    )
