"""Tasks that generate images: from captions, and without them, on diffusers' pipelines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageOps
from torch import Tensor, nn

from veratune.errors import ConfigError, UnsupportedError
from veratune.tasks.data import pick_columns
from veratune.tasks.diffusion.captions import has_caption_split, load_caption_examples
from veratune.tasks.diffusion.models import Diffusion, TextToImageModel, Unconditional
from veratune.tasks.diffusion.pipelines import load_pipeline, pipeline_config
from veratune.tasks.vision.images import ImageTask, augment_image, decode_image, validate_images

SAMPLE_STEPS = 25


class Pixels:
    """Images as tensors (channels, side, side) in [-1, 1]: the middle square, resized."""

    def __init__(self, side: int, channels: int = 3) -> None:
        self.side, self.channels = side, channels

    def __call__(self, image: Image.Image) -> Tensor:
        square = ImageOps.fit(image, (self.side, self.side), Image.Resampling.LANCZOS)
        values = np.asarray(
            square if self.channels == 3 else square.convert("L"), np.float32
        ).reshape(self.side, self.side, -1)
        return torch.from_numpy(values.transpose(2, 0, 1) / 127.5 - 1)


class ImageGeneration(ImageTask):
    """Base of image-generation tasks. The score is the loss; each checkpoint draws a sample
    grid.
    """

    accepted_settings = ImageTask.accepted_settings | {"min_snr", "sample_steps"}
    transformers_model = False

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        min_snr: float = 0.0,
        sample_steps: int = SAMPLE_STEPS,
        **options: Any,
    ) -> None:
        """See `TrainSettings` and `ImageTask`."""
        super().__init__(columns, **options)
        if min_snr < 0 or sample_steps < 1:
            raise ConfigError(
                f"min_snr is {min_snr} and sample_steps {sample_steps}; at least 0 and at least 1 "
                "are wanted"
            )
        self.min_snr, self.sample_steps = min_snr, sample_steps
        self.prompts: list[str] = []

    def load_examples(
        self, source: str, split: str = "train", config: str | None = None
    ) -> Dataset:
        return load_caption_examples(source, split, config)

    def has_split(self, source: str, split: str) -> bool:
        return has_caption_split(source, split)

    def encode(self, examples: Dataset, processor: Pixels, training: bool = False) -> Dataset:
        columns = pick_columns(examples, self.roles, self.columns)
        column, text, how = (
            columns["image"],
            columns.get("text"),
            self.augment if training else "none",
        )
        examples = validate_images(
            examples.select_columns(list(columns.values())), column, self.bad_images
        )
        examples = examples.add_column("_index", list(range(len(examples))))

        def turn(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            images = zip(batch["_index"], batch[column], strict=True)
            pixels = [
                processor(augment_image(decode_image(value, row), how)) for row, value in images
            ]
            return {"pixel_values": pixels, "index": batch["_index"]} | (
                {"captions": batch[text]} if text else {}
            )

        return examples.with_transform(turn)

    def collator(self, processor: Pixels) -> Any:
        def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
            out: dict[str, Any] = {
                "pixel_values": torch.stack([row["pixel_values"] for row in batch])
            }
            out["index"] = torch.tensor([row["index"] for row in batch])
            return out | (
                {"captions": [row["captions"] for row in batch]} if "captions" in batch[0] else {}
            )

        return collate

    def preview(self, encoded: Mapping[str, Any], processor: Pixels) -> list[tuple[str, bool]]:
        side = encoded["pixel_values"].shape[-1]
        return [
            (f"an image of {side} x {side} pixels: ", False),
            (encoded.get("captions", "(no caption)"), True),
        ]

    def sample(self, model: nn.Module, processor: Pixels, path: Path) -> Path | None:
        from veratune.analysis.pictures import draw_grid  # matplotlib is slow to import

        assert isinstance(model, Diffusion)
        was = model.training
        model.eval()
        lists = model.draw(
            4 if self.prompts else 16, self.prompts, 0, self.sample_steps, processor.side
        )
        model.train(was)
        names = self.prompts or [""]
        return draw_grid(
            dict(zip(names, lists, strict=True)), path, zoom=max(1, 64 // processor.side)
        )

    def save(self, model: nn.Module, processor: Pixels, folder: Path) -> None:
        assert isinstance(model, TextToImageModel | Unconditional)
        model.save_pretrained(folder)


class TextToImage(ImageGeneration):
    """Captions to images, on Stable Diffusion 1.x, 2.x and XL pipelines.

    Targets query and value are the attention projections of the U-Net; "all-conv" adds its
    convolutions.
    """

    name = "text-to-image"
    roles = {"image": ("image", "img"), "text": ("text", "caption", "prompt")}
    accepted_settings = ImageGeneration.accepted_settings | {
        "prompts",
        "caption",
        "train_text_encoder",
    }

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        caption: str | None = None,
        prompts: list[str] | None = None,
        train_text_encoder: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(columns, **options)
        self.caption, self.prompts, self.train_text_encoder = (
            caption,
            list(prompts or []),
            train_text_encoder,
        )

    def to_metadata(self) -> dict[str, Any]:
        return super().to_metadata() | {
            "train_text_encoder": self.train_text_encoder,
            "prompts": self.prompts,
        }

    def load_examples(
        self, source: str, split: str = "train", config: str | None = None
    ) -> Dataset:
        return load_caption_examples(source, split, config, self.caption)

    def fit_labels(self, examples: Dataset) -> None:
        if not self.prompts:
            column = pick_columns(examples, self.roles, self.columns)["text"]
            self.prompts = list(dict.fromkeys(examples[column][:64]))[:4]

    def load_processor(self, model: str) -> Pixels:
        config = pipeline_config(model)
        if self.image_size is not None:
            return Pixels(self.image_size)
        side = config["unet"].get("sample_size") or 64
        return Pixels(side * 2 ** (len(config["vae"].get("block_out_channels", [0] * 4)) - 1))

    def load_model(self, model: str, processor: Any, **options: Any) -> nn.Module:
        pipe = load_pipeline(model, **options)
        if not hasattr(pipe, "unet") or not hasattr(pipe, "encode_prompt"):
            raise UnsupportedError(
                f"{model} is a {type(pipe).__name__}; pipelines with a U-Net and a text encoder "
                "can be adapted (SD 1.x, 2.x, XL)"
            )
        return TextToImageModel(pipe, self.train_text_encoder, self.min_snr, model)


class UnconditionalImage(ImageGeneration):
    """Images without captions, on diffusers' DDPM pipelines (a UNet2DModel and its scheduler)."""

    name = "unconditional-image"
    roles = {"image": ("image", "img")}

    def load_processor(self, model: str) -> Pixels:
        config = pipeline_config(model)["unet"]
        return Pixels(
            self.image_size or config.get("sample_size") or 64, config.get("in_channels", 3)
        )

    def load_model(self, model: str, processor: Any, **options: Any) -> nn.Module:
        pipe = load_pipeline(model, **options)
        if not hasattr(pipe, "unet") or hasattr(pipe, "text_encoder"):
            raise UnsupportedError(
                f"{model} is a {type(pipe).__name__}; a pipeline of a U-Net and a scheduler alone "
                "is wanted"
            )
        return Unconditional(pipe.unet, pipe.scheduler, processor.channels, self.min_snr, model)
