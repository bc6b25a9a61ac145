"""Rows with images and, for some tasks, a text for each: from folders as the tools of the field
leave them, and from data sets.
"""

import json
from pathlib import Path

from datasets import Dataset

from veratune.errors import DataError
from veratune.tasks.data import SPLITS, has_split, read_text
from veratune.tasks.vision.images import ENDINGS, has_image_split, load_image_examples

METADATA = "metadata.jsonl"


def load_caption_examples(
    source: str, split: str = "train", config: str | None = None, caption: str | None = None
) -> Dataset:
    """The rows of one split: image and, where there is one, text.

    source: a folder of images (or of folders named after splits), each image with a text file of
    its name beside it, or all in metadata.jsonl ({"file_name", "text"} a line), or without texts,
    as DreamBooth's subject folders are; else what `load_image_examples` takes. caption: the text of
    images that have none. Raises DataError.
    """
    folder = Path(source)
    if folder.is_dir() and not has_split(source, split):
        inner = next(
            (folder / name for name in SPLITS.get(split, (split,)) if _images(folder / name)), None
        )
        chosen = inner or (folder if split == "train" and _images(folder) else None)
        if chosen is not None:
            return _from_folder(chosen, caption)
    examples = load_image_examples(source, split, config)
    if (
        caption is not None
        and "text" not in examples.column_names
        and "caption" not in examples.column_names
    ):
        examples = examples.add_column("text", [caption] * len(examples))
    return examples


def has_caption_split(source: str, split: str) -> bool:
    """Whether a folder has images for a split."""
    folder = Path(source)
    inside = folder.is_dir() and any(_images(folder / name) for name in SPLITS.get(split, (split,)))
    return inside or has_image_split(source, split)


def _from_folder(folder: Path, caption: str | None) -> Dataset:
    told: dict[str, str] = {}
    if (folder / METADATA).is_file():
        for number, line in enumerate(read_text(folder / METADATA).splitlines(), 1):
            try:
                entry = json.loads(line)
                told[str(entry["file_name"])] = str(entry["text"])
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f'{folder / METADATA}: line {number} is no {{"file_name", "text"}} ({error})'
                ) from None
        missing = next((name for name in told if not (folder / name).is_file()), None)
        if missing is not None:
            raise DataError(f"{folder / METADATA}: it names {missing!r}, which is not there")
    images, texts = [], []
    for file in _images(folder):
        beside = file.with_suffix(".txt")
        text = told.get(file.name) or (read_text(beside).strip() if beside.is_file() else caption)
        images.append({"bytes": None, "path": str(file)})
        texts.append(text)
    examples = Dataset.from_dict({"image": images})
    if all(text is None for text in texts):
        return examples
    silent = next(
        (
            Path(str(image["path"])).name
            for image, text in zip(images, texts, strict=True)
            if text is None
        ),
        None,
    )
    if silent is not None:
        raise DataError(
            f"{folder}: {silent} has no text; put one beside it, or give --caption for images "
            "without"
        )
    return examples.add_column("text", texts)


def _images(folder: Path) -> list[Path]:
    return (
        sorted(f for f in folder.iterdir() if f.suffix.lower() in ENDINGS)
        if folder.is_dir()
        else []
    )
