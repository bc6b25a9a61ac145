"""Rows with boxes: from COCO and VOC folders and from columns, as one form: image, boxes (x0, y0,
x1, y1 in pixels), labels (names).
"""

import json
import warnings
import xml.etree.ElementTree as xml
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from veratune.errors import DataError
from veratune.tasks.data import SPLITS, has_split, read_text
from veratune.tasks.vision.images import has_image_split, load_image_examples

BadBoxes = Literal["fail", "clip"]
NAMES = "labels.json"
_SLACK = 1.0  # pixels by which a box may leave its image: annotation tools count from 0 or from 1


def load_box_examples(source: str, split: str = "train", config: str | None = None) -> Dataset:
    """The rows of one split: image, boxes, labels.

    source: a folder in COCO's form (annotations/instances_SPLIT.json beside images, or
    SPLIT/_annotations.coco.json), in VOC's (Annotations, JPEGImages, ImageSets/Main/SPLIT.txt), or
    rows as `load_image_examples` takes them with columns boxes and labels, or objects {bbox (x, y,
    width, height), category}. Names of numbered classes may stand in labels.json. Raises DataError.
    """
    folder = Path(source)
    if folder.is_dir() and not has_split(source, split):
        coco = _coco_file(folder, split)
        if coco is not None:
            return _coco(coco)
        if (folder / "Annotations").is_dir():
            return _voc(folder, split)
    examples = load_image_examples(source, split, config)
    if "objects" in examples.column_names and "boxes" not in examples.column_names:
        examples = _from_objects(examples)
    names = _names(folder / NAMES) if folder.is_dir() else {}
    if names and "labels" in examples.column_names:
        named = [
            [names.get(str(label), str(label)) for label in labels] for labels in examples["labels"]
        ]
        examples = examples.remove_columns("labels").add_column("labels", named)
    return examples


def has_box_split(source: str, split: str) -> bool:
    """Whether a folder has rows for a split."""
    folder = Path(source)
    if not folder.is_dir():
        return False
    voc = any(
        (folder / "ImageSets" / "Main" / f"{name}.txt").is_file()
        for name in SPLITS.get(split, (split,))
    )
    return has_image_split(source, split) or voc or _coco_file(folder, split) is not None


def validate_boxes(
    boxes: list[list[float]],
    labels: list[Any],
    width: int,
    height: int,
    row: int,
    bad: BadBoxes = "fail",
) -> tuple[list[list[float]], list[Any]]:
    """Boxes inside their image, cut to it. bad: "fail" raises DataError for a box that is empty or
    lies over a pixel outside, "clip" cuts it and leaves out what is empty.
    """
    if len(boxes) != len(labels):
        raise DataError(f"row {row}: {len(boxes)} boxes and {len(labels)} labels")
    kept, named = [], []
    for box, label in zip(boxes, labels, strict=True):
        if len(box) != 4 or not all(-1e6 < v < 1e6 for v in box):
            raise DataError(f"row {row}: {box} is no box; x0, y0, x1, y1 in pixels are wanted")
        x0, y0, x1, y1 = box
        outside = max(-x0, -y0, x1 - width, y1 - height)
        cut = [max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1)]
        empty = cut[2] <= cut[0] or cut[3] <= cut[1]
        if bad == "fail" and (empty or outside > _SLACK):
            state = "is empty" if x1 <= x0 or y1 <= y0 else "lies outside it"
            raise DataError(
                f"row {row}: the image is {width} x {height} and the box "
                f"{[round(v, 1) for v in box]} {state}; mend it, or cut such boxes to the "
                "image with --bad-boxes clip"
            )
        if not empty:
            kept.append(cut)
            named.append(label)
    return kept, named


def _coco_file(folder: Path, split: str) -> Path | None:
    for name in SPLITS.get(split, (split,)):
        places = [
            folder / name / "_annotations.coco.json",
            folder / "annotations" / f"{name}.json",
            folder / f"{name}.json",
        ]
        places += sorted((folder / "annotations").glob(f"instances_{name}*.json"))
        for place in places:
            if place.is_file():
                return place
    return None


def _coco(file: Path) -> Dataset:
    """Source of the form: cocodataset.org, "Data format"."""
    try:
        stored = json.loads(file.read_text())
        names = {c["id"]: str(c["name"]) for c in stored["categories"]}
        images = {i["id"]: i["file_name"] for i in stored["images"]}
        objects: dict[Any, tuple[list[list[float]], list[str]]] = {key: ([], []) for key in images}
        crowds = 0
        for one in stored["annotations"]:
            if one.get("iscrowd"):
                crowds += 1
                continue
            x, y, w, h = map(float, one["bbox"])
            objects[one["image_id"]][0].append([x, y, x + w, y + h])
            objects[one["image_id"]][1].append(names[one["category_id"]])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file}: not COCO annotations ({type(error).__name__}: {error})") from None
    if crowds:
        warnings.warn(
            f"{file}: {crowds} crowd regions were left out; they have no box of their own",
            stacklevel=2,
        )
    split = file.stem.removeprefix("instances_")
    roots = [
        file.parent,
        file.parent.parent / split,
        file.parent / split,
        file.parent.parent / "images",
        file.parent.parent,
    ]
    paths = {
        key: next((root / name for root in roots if (root / name).is_file()), None)
        for key, name in images.items()
    }
    missing = next((images[key] for key, path in paths.items() if path is None), None)
    if missing is not None:
        raise DataError(
            f"{file}: it names the image {missing!r}, which is in none of "
            f"{', '.join(dict.fromkeys(str(r) for r in roots))}"
        )
    return _rows([(str(paths[key]), *objects[key]) for key in images], file)


def _voc(folder: Path, split: str) -> Dataset:
    """Source of the form: host.robots.ox.ac.uk/pascal/VOC, development kit; its pixels count from
    1.
    """
    lists = [folder / "ImageSets" / "Main" / f"{name}.txt" for name in SPLITS.get(split, (split,))]
    chosen = next((file for file in lists if file.is_file()), None)
    if chosen is None:
        raise DataError(
            f"{folder}: no list of the split {split!r} in ImageSets/Main; {split}.txt is wanted"
        )
    found = []
    for name in read_text(chosen).split():
        file = folder / "Annotations" / f"{name}.xml"
        try:
            tree = xml.parse(file).getroot()
            picture = folder / "JPEGImages" / (tree.findtext("filename") or f"{name}.jpg")
            boxes, labels = [], []
            for one in tree.iter("object"):
                box: Any = one.find("bndbox")
                x0, y0, x1, y1 = (
                    float(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax")
                )
                boxes.append([x0 - 1, y0 - 1, x1, y1])
                labels.append(str(one.findtext("name")))
        except (OSError, xml.ParseError, AttributeError, TypeError, ValueError) as error:
            raise DataError(
                f"{file}: not VOC annotations ({type(error).__name__}: {error})"
            ) from None
        if not picture.is_file():
            raise DataError(f"{file}: its image {picture} is not there")
        found.append((str(picture), boxes, labels))
    return _rows(found, chosen)


def _from_objects(examples: Dataset) -> Dataset:
    feature: Any = examples.features["objects"]
    inner = getattr(feature, "feature", feature)
    kind = inner["category"] if isinstance(inner, Mapping) and "category" in inner else None
    declared = getattr(getattr(kind, "feature", kind), "names", None)
    boxes, labels = [], []
    for objects in examples["objects"]:
        pairs = (
            objects
            if isinstance(objects, Mapping)
            else {key: [one[key] for one in objects] for key in ("bbox", "category")}
        )
        boxes.append([[x, y, x + w, y + h] for x, y, w, h in pairs["bbox"]])
        labels.append([declared[c] if declared else str(c) for c in pairs["category"]])
    return (
        examples.remove_columns("objects").add_column("boxes", boxes).add_column("labels", labels)
    )


def _names(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    try:
        return {str(key): str(value) for key, value in json.loads(file.read_text()).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{file}: a JSON object from class numbers to names is wanted ({error})"
        ) from None


def _rows(found: list[tuple[str, list[list[float]], list[str]]], file: Path) -> Dataset:
    if not found:
        raise DataError(f"{file}: the data set is empty; at least one row is wanted")
    images, boxes, labels = zip(*found, strict=True)
    stored = [{"bytes": None, "path": image} for image in images]
    return Dataset.from_dict({"image": stored, "boxes": list(boxes), "labels": list(labels)})
