"""Rows with images: from folders, MNIST's files and data sets, decoded one way, and unreadable ones
named.
"""

import gzip
import io
import os
import struct
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from datasets import Dataset, Image, load_dataset
from PIL import Image as pil
from PIL import ImageOps
from torch import Tensor
from tqdm import tqdm
from transformers import AutoImageProcessor

from veratune.errors import ConfigError, DataError
from veratune.loading import loading_errors
from veratune.tasks.base import Task
from veratune.tasks.data import SPLITS, has_split, load_examples

BadImages = Literal["fail", "skip"]
Augment = Literal["none", "flip", "crop"]

_MNIST = {
    "train": "train",
    "validation": "t10k",
    "test": "t10k",
}  # MNIST's files have no third split
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class ImageTask(Task):
    """Base of image tasks: image size, augmentation, and the policy for unreadable images."""

    accepted_settings = frozenset({"image_size", "augment", "bad_images"})
    augments: ClassVar[tuple[str, ...]] = ("none", "flip", "crop")

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        image_size: int | None = None,
        augment: Augment = "none",
        bad_images: BadImages = "fail",
    ) -> None:
        """See `TrainSettings`. Raises ConfigError for a value that a setting does not have."""
        super().__init__(columns)
        if image_size is not None and image_size < 1:
            raise ConfigError(f"image_size is {image_size}; it must be at least 1 pixel")
        for name, value, known in (
            ("augment", augment, self.augments),
            ("bad_images", bad_images, ("fail", "skip")),
        ):
            if value not in known:
                raise ConfigError(
                    f"{name} is {value!r}; task {self.name!r} knows {', '.join(known)}"
                )
        self.image_size, self.augment, self.bad_images = image_size, augment, bad_images

    def to_metadata(self) -> dict[str, Any]:
        return super().to_metadata() | {"image_size": self.image_size}

    def load_examples(
        self, source: str, split: str = "train", config: str | None = None
    ) -> Dataset:
        return load_image_examples(source, split, config)

    def has_split(self, source: str, split: str) -> bool:
        return has_image_split(source, split)

    def load_processor(self, model: str) -> Any:
        """The image processor of a base model, for images of the side that was asked for."""
        with loading_errors(model):
            processor = AutoImageProcessor.from_pretrained(model, backend="pil")
        if self.image_size is not None:
            square = {"height": self.image_size, "width": self.image_size}
            processor.size = square
            if getattr(processor, "do_center_crop", False):
                processor.crop_size = square
        return processor


def load_image_examples(source: str, split: str = "train", config: str | None = None) -> Dataset:
    """The rows of one split, with an `image` column.

    source: a folder with one folder of images for each class (or such folders in one folder for
    each split), a folder of MNIST's idx files, or what `veratune.tasks.data.load_examples` takes:
    parquet with encoded images, jsonl with their paths, data set ids. Raises DataError.
    """
    path = Path(source)
    if path.is_dir() and not has_split(source, split):
        if (path / f"{_MNIST.get(split, split)}-images-idx3-ubyte.gz").is_file():
            return _mnist(path, _MNIST.get(split, split))
        folder = _split_folder(path, split)
        if folder is None and split == "train" and _classes(path):
            folder = path
        if folder is not None and config is None:
            return _image_folder(folder)
    examples = load_examples(source, split, config)
    if (
        path.exists()
        and "image" in examples.column_names
        and examples.features["image"].dtype == "string"
    ):
        base = path if path.is_dir() else path.parent  # paths beside the file that names them
        examples = examples.map(lambda row: {"image": str(base / row["image"])}, desc="paths")
    return examples


def has_image_split(source: str, split: str) -> bool:
    """Whether a folder has images for a split."""
    path = Path(source)
    if not path.is_dir():
        return False
    mnist = path / f"{_MNIST.get(split, split)}-images-idx3-ubyte.gz"
    return has_split(source, split) or mnist.is_file() or _split_folder(path, split) is not None


def validate_images(examples: Dataset, column: str, bad: BadImages = "fail") -> Dataset:
    """Rows whose images can be decoded, the column as {bytes, path}. See
    `validate_images_with_sizes`.
    """
    return validate_images_with_sizes(examples, column, bad)[0]


def validate_images_with_sizes(
    examples: Dataset, column: str, bad: BadImages = "fail"
) -> tuple[Dataset, list[tuple[int, int]]]:
    """Rows whose images can be decoded, the column as {bytes, path}, and the (width, height) of
    each in pixels.

    bad: "fail" raises DataError naming the first unreadable image; "skip" leaves them out and names
    them in a warning. Every image is decoded once for it.
    """
    if not isinstance(examples.features[column], Image | dict) and examples.features[
        column
    ].dtype not in (
        "binary",
        "string",
    ):
        raise DataError(
            f"column {column!r} holds {examples.features[column]}; encoded images or their paths "
            "are wanted"
        )
    examples = examples.cast_column(column, Image(decode=False))
    kept, lost, sizes = [], [], []
    values = examples[column]
    for row in tqdm(
        range(len(examples)),
        desc="Reading images",
        file=sys.stderr,
        disable=len(examples) < 5000,
        leave=False,
    ):
        try:
            sizes.append(decode_image(values[row], row).size)
            kept.append(row)
        except DataError as error:
            if bad == "fail":
                raise DataError(
                    f"{error}; mend it, or leave such images out with --bad-images skip"
                ) from None
            lost.append(str(error))
    if not lost:
        return examples, sizes
    if not kept:
        raise DataError(f"none of the {len(examples)} images can be read; the first: {lost[0]}")
    warnings.warn(
        f"{len(lost)} images left out: {'; '.join(lost[:5])}{' ...' if len(lost) > 5 else ''}",
        stacklevel=2,
    )
    return examples.select(kept), sizes


def decode_image(value: Mapping[str, Any], row: int) -> pil.Image:
    """An encoded image as RGB, upright; see `read_image`.

    value: {bytes, path} as data sets store it. Raises DataError naming the row and, where there is
    one, the file.
    """
    file = f" ({os.path.basename(value['path'])})" if value and value.get("path") else ""
    try:
        return read_image(value)
    except ValueError as error:
        raise DataError(f"row {row}{file}: {error}") from None


def read_image(value: Mapping[str, Any], max_pixels: int | None = None) -> pil.Image:
    """Decode an image as RGB, upright: grey, 16-bit and palette images too; what is transparent
    becomes white.

    Args:
        value: {bytes, path} as data sets store it.
        max_pixels: Most pixels, which are counted before anything is decoded; None for Pillow's
            own limit.

    Raises:
        ValueError: There is no image, it has too many pixels, or it cannot be decoded.
    """
    if not value or (value.get("bytes") is None and not value.get("path")):
        raise ValueError("no image")
    try:
        source = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"]
        with warnings.catch_warnings(), pil.open(source) as file:
            warnings.simplefilter("ignore")
            pixels = file.width * file.height
            if max_pixels is None or pixels <= max_pixels:
                image = ImageOps.exif_transpose(file)
                image.load()
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError, struct.error) as error:
        raise ValueError(f"not a readable image ({' '.join(str(error).split())[:120]})") from None
    if max_pixels is not None and pixels > max_pixels:
        raise ValueError(f"an image of {pixels:,} pixels; at most {max_pixels:,} are decoded")
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        wide = np.asarray(image, dtype=np.float32)
        return pil.fromarray(
            (wide / 257 if wide.max() > 255 else wide).round().clip(0, 255).astype(np.uint8)
        ).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = pil.new("RGBA", image.size, "white")
        return pil.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def augment_image(image: pil.Image, how: Augment) -> pil.Image:
    """A training image, changed at random (torch's generator): see `TrainSettings.augment`."""
    if how == "crop":
        width, height = image.size
        area = width * height * (0.35 + 0.65 * torch.rand(()).item())
        ratio = (3 / 4) * (16 / 9) ** torch.rand(()).item()
        w, h = min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5))
        left, top = (int(torch.randint(0, room + 1, ()).item()) for room in (width - w, height - h))
        image = image.crop((left, top, left + w, top + h))
    if how != "none" and torch.rand(()).item() < 0.5:
        image = ImageOps.mirror(image)
    return image


def stack(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of equal inputs as tensors."""
    return {key: torch.stack([torch.as_tensor(row[key]) for row in batch]) for key in batch[0]}


def _mnist(folder: Path, split: str) -> Dataset:
    """Source: MNIST's file format, http://yann.lecun.com/exdb/mnist (idx)."""

    def read(kind: str, magic: int, dimensions: int) -> np.ndarray:
        file = folder / f"{split}-{kind}-ubyte.gz"
        try:
            with gzip.open(file) as opened:
                data = opened.read()
            found, *shape = struct.unpack(f">{dimensions + 1}I", data[: 4 * (dimensions + 1)])
            if found != magic:
                raise ValueError(f"magic number {found}, not {magic}")
            return np.frombuffer(data, np.uint8, offset=4 * (dimensions + 1)).reshape(shape)
        except (OSError, EOFError, ValueError, struct.error) as error:
            raise DataError(f"{file}: not one of MNIST's idx files ({error})") from None

    images, labels = read("images-idx3", 2051, 3), read("labels-idx1", 2049, 1)
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} images and {len(labels)} labels for {split!r}")
    encoded = []
    for image in images:
        out = io.BytesIO()
        pil.fromarray(image).save(out, "BMP")
        encoded.append({"bytes": out.getvalue(), "path": None})
    return Dataset.from_dict({"image": encoded, "label": labels.tolist()}).cast_column(
        "image", Image(decode=False)
    )


def _image_folder(folder: Path) -> Dataset:
    classes = _classes(folder)
    if len(classes) < 2:
        raise DataError(
            f"{folder}: at least two folders of images, one for each class, are wanted; it has "
            f"{', '.join(classes) or 'none'}"
        )
    try:
        return load_dataset("imagefolder", data_dir=str(folder), split="train", drop_labels=False)
    except Exception as error:  # every builder has its own exceptions for bad content
        raise DataError(
            f"{folder}: cannot be read as a folder of images: "
            f"{str(error.__cause__ or error).splitlines()[0]}"
        ) from error


def _split_folder(path: Path, split: str) -> Path | None:
    return next(
        (
            path / name
            for name in SPLITS.get(split, (split,))
            if (path / name).is_dir() and _classes(path / name)
        ),
        None,
    )


def _classes(folder: Path) -> list[str]:
    """The sub-folders that hold images."""
    if not folder.is_dir():
        return []
    return sorted(
        inner.name
        for inner in folder.iterdir()
        if inner.is_dir()
        and any(f.suffix.lower() in ENDINGS for f in inner.iterdir() if f.is_file())
    )
