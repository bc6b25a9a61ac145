import gzip
import io
import struct
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from tests import fakes
from veratune.errors import DataError
from veratune.tasks.vision.images import (
    augment_image,
    decode_image,
    has_image_split,
    load_image_examples,
    validate_images,
)


def encoded(image, form="PNG", **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return {"bytes": out.getvalue(), "path": None}


def test_images_of_every_kind_become_rgb():
    grey = np.full((3, 4), 128, np.uint8)
    assert decode_image(encoded(Image.fromarray(grey)), 0).getpixel((0, 0)) == (128, 128, 128)
    wide = Image.fromarray(np.full((3, 4), 128 * 257, np.uint16))
    assert decode_image(encoded(wide), 0).getpixel((0, 0)) == (
        128,
        128,
        128,
    )  # 16 bits are scaled, not cut
    clear = Image.new("RGBA", (4, 3), (255, 0, 0, 0))
    assert decode_image(encoded(clear), 0).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded(Image.new("RGBA", (4, 3), (255, 0, 0, 255))), 0).getpixel(
        (0, 0)
    ) == (
        255,
        0,
        0,
    )
    palette = Image.new("P", (4, 3), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert decode_image(encoded(palette, "GIF"), 0).getpixel((0, 0)) == (10, 20, 30)
    assert decode_image(encoded(Image.new("CMYK", (4, 3)), "JPEG"), 0).mode == "RGB"
    turned = Image.new("RGB", (4, 3))
    exif = turned.getexif()
    exif[0x0112] = 6  # lying on its side
    assert decode_image(encoded(turned, "JPEG", exif=exif), 0).size == (3, 4)


def test_unreadable_images_are_named_and_fail_or_are_left_out():
    good = encoded(Image.new("RGB", (8, 8), "red"), "JPEG")
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    cut = {"bytes": encoded(noisy, "JPEG")["bytes"][:900], "path": "cut.jpg"}
    rows = Dataset.from_dict(
        {
            "image": [
                good,
                cut,
                good,
                {"bytes": b"no image", "path": None},
                {"bytes": None, "path": None},
            ]
        }
    )
    with pytest.raises(
        DataError, match=r"row 1 \(cut.jpg\): not a readable image .*--bad-images skip"
    ):
        validate_images(rows, "image")
    with pytest.warns(
        UserWarning,
        match=r"3 images left out: row 1 \(cut.jpg\).*row 3: not a readable image.*row 4: no image",
    ):
        assert len(validate_images(rows, "image", "skip")) == 2
    with pytest.raises(DataError, match="none of the 1 images can be read"):
        validate_images(rows.select([1]), "image", "skip")
    with pytest.raises(
        DataError, match="column 'n' holds .*; encoded images or their paths are wanted"
    ):
        validate_images(Dataset.from_dict({"n": [1.5]}), "n")


def test_folders_of_classes_with_and_without_splits(tmp_path):
    fakes.image_folder(tmp_path / "a", {"train": 4, "val": 2})
    rows = load_image_examples(str(tmp_path / "a"))
    assert rows.features["label"].names == ["above", "below"]
    assert sorted(rows["label"]) == [0, 0, 1, 1]
    assert not has_image_split(str(tmp_path / "a"), "validation")
    (tmp_path / "a" / "val").rename(tmp_path / "a" / "valid")
    assert has_image_split(str(tmp_path / "a"), "validation")
    assert len(load_image_examples(str(tmp_path / "a"), "validation")) == 2
    assert len(load_image_examples(str(tmp_path / "a" / "train"))) == 4  # one split alone
    with pytest.raises(DataError, match="no file for the split 'test'"):
        load_image_examples(str(tmp_path / "a"), "test")


def test_paths_in_a_file_are_beside_it(tmp_path):
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "x.png")
    (tmp_path / "train.jsonl").write_text('{"image": "x.png", "label": 0}\n')
    rows = validate_images(load_image_examples(str(tmp_path)), "image")
    assert decode_image(rows[0]["image"], 0).getpixel((0, 0)) == (0, 0, 255)


def test_mnist_files(tmp_path):
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    for name, magic, values in (
        ("images-idx3", 2051, images),
        ("labels-idx1", 2049, np.array([7, 1], np.uint8)),
    ):
        data = struct.pack(f">{1 + values.ndim}I", magic, *values.shape) + values.tobytes()
        (tmp_path / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(data))
    assert has_image_split(str(tmp_path), "test")
    assert not has_image_split(str(tmp_path), "train")
    rows = load_image_examples(str(tmp_path), "test")
    assert rows["label"] == [7, 1]
    assert np.array_equal(np.asarray(decode_image(rows[1]["image"], 1))[..., 0], images[1])
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\0\0rest"))
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte.gz: not one of MNIST's idx files"):
        load_image_examples(str(tmp_path), "test")


def test_augmentation_is_random_and_repeatable():
    image = Image.fromarray(np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3))
    assert augment_image(image, "none") is image
    torch.manual_seed(0)
    once = [np.asarray(augment_image(image, "crop")) for _ in range(6)]
    torch.manual_seed(0)
    again = [np.asarray(augment_image(image, "crop")) for _ in range(6)]
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert len({a.shape for a in once}) > 1
    for part in once:  # a third of the image at least, give or take a row and a column
        assert part.shape[0] * part.shape[1] >= 0.33 * 48 * 64 - 64
    flips = {np.asarray(augment_image(image, "flip")).tobytes() for _ in range(20)}
    assert flips == {np.asarray(image).tobytes(), np.asarray(image)[:, ::-1].tobytes()}


def test_nothing_is_said_about_good_images():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            len(
                validate_images(
                    Dataset.from_dict({"image": [encoded(Image.new("RGB", (2, 2)))]}), "image"
                )
            )
            == 1
        )
