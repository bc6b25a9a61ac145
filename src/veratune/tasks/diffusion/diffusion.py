"""Denoising diffusion: text to image on diffusers' Stable Diffusion pipelines, and unconditional models.

    Diffusion (abstract)
    ├── Unconditional      epsilon from a noisy image and its step
    └── TextToImageModel   a pipeline's U-Net, under its texts; the text encoders too, where they are adapted

The loss is Ho et al.'s (arXiv 2006.11239, equation 14), the mean of |target - f(x_t, t)|² over pixels, where the target is the noise or,
for a scheduler that says so, the velocity (arXiv 2202.00512); with min-SNR weights on request (arXiv 2303.09556).
"""

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import PretrainedConfig

from veratune.adapter import Adapter, install
from veratune.errors import ConfigError, UnsupportedError
from veratune.formats import native
from veratune.tasks.base import loading
from veratune.tasks.data import pick_columns
from veratune.tasks.diffusion.captions import has_caption_split, load_caption_examples
from veratune.tasks.vision.images import ImageTask, augment_image, decode_image, validate_images

SAMPLE_STEPS = 25


class Diffusion(nn.Module, abc.ABC):
    """A denoising model as a trainer calls it: {"loss"} of a batch of images.

    scheduler: diffusers', for the noise and the steps. min_snr: gamma of the min-SNR weights; 0 for none. Rows with an index draw
    their step and noise from it in evaluation, so that its loss is comparable from one evaluation to the next.
    """

    def __init__(self, scheduler: Any, min_snr: float = 0.0, name: str = "") -> None:
        super().__init__()
        self.scheduler, self.min_snr = scheduler, min_snr
        self.config = PretrainedConfig()
        self.config.name_or_path = name

    @abc.abstractmethod
    def predict(self, noisy: Tensor, t: Tensor, condition: Any) -> Tensor:
        """The noise (or the velocity) in `noisy` (N, C, H, W) at steps t (N,)."""

    def latents(self, pixels: Tensor) -> Tensor:
        """What is noised: the images in [-1, 1], or what a VAE makes of them."""
        return pixels

    def condition(self, captions: Sequence[str] | None, size: tuple[int, int]) -> Any:
        """What `predict` is told beside the step."""
        return None

    def forward(
        self,
        pixel_values: Tensor,
        captions: Sequence[str] | None = None,
        index: Tensor | None = None,
        return_loss: bool = True,
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            clean = self.latents(pixel_values)
        steps = self.scheduler.config.num_train_timesteps
        if self.training or index is None:
            noise, t = (
                torch.randn_like(clean),
                torch.randint(0, steps, (len(clean),), device=clean.device),
            )
        else:
            drawn = [torch.Generator().manual_seed(int(i)) for i in index]
            noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in drawn]).to(
                clean
            )
            t = torch.stack([torch.randint(0, steps, (), generator=g) for g in drawn]).to(
                clean.device
            )
        noisy = self.scheduler.add_noise(clean, noise, t)
        kind = self.scheduler.config.prediction_type
        target = self.scheduler.get_velocity(clean, noise, t) if kind == "v_prediction" else noise
        guess = self.predict(
            noisy, t, self.condition(captions, (pixel_values.shape[-2], pixel_values.shape[-1]))
        )
        losses = (guess.float() - target.float()).square().flatten(1).mean(1)
        if self.min_snr:
            alpha = self.scheduler.alphas_cumprod.to(t.device)[t]
            snr = alpha / (1 - alpha)
            losses = (
                losses * snr.clamp(max=self.min_snr) / (snr + 1 if kind == "v_prediction" else snr)
            )
        return {"loss": losses.mean()}

    @abc.abstractmethod
    def draw(
        self, count: int, prompts: Sequence[str], seed: int, steps: int, size: int
    ) -> list[list[Image.Image]]:
        """`count` images for each prompt (one list where there are none), from fixed noise."""


class Unconditional(Diffusion):
    """A network `unet(x, t)`: diffusers' UNet2DModel, or one that returns epsilon itself."""

    def __init__(
        self, unet: nn.Module, scheduler: Any, channels: int, min_snr: float = 0.0, name: str = ""
    ) -> None:
        super().__init__(scheduler, min_snr, name)
        self.unet, self.channels = unet, channels

    def predict(self, noisy: Tensor, t: Tensor, condition: Any) -> Tensor:
        out = self.unet(noisy, t)
        return out.sample if hasattr(out, "sample") else out

    @torch.no_grad()
    def draw(
        self, count: int, prompts: Sequence[str], seed: int, steps: int, size: int
    ) -> list[list[Image.Image]]:
        device = next(self.parameters()).device
        x = torch.randn(
            count, self.channels, size, size, generator=torch.Generator().manual_seed(seed)
        ).to(device)
        self.scheduler.set_timesteps(steps)
        noise = torch.Generator().manual_seed(seed)
        for t in self.scheduler.timesteps:
            guess = self.predict(x, t.expand(count).to(device), None)
            x = self.scheduler.step(guess, t, x, generator=noise).prev_sample
        pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
        return [
            [Image.fromarray(p[0] if self.channels == 1 else p.transpose(1, 2, 0)) for p in pixels]
        ]

    def save_pretrained(self, folder: Path) -> None:
        """The pipeline with the weights as they are."""
        from diffusers import DDPMPipeline

        pipe: Any = DDPMPipeline(unet=self.unet, scheduler=self.scheduler)
        pipe.save_pretrained(folder)


class TextToImageModel(Diffusion):
    """The parts of a Stable Diffusion pipeline (1.x, 2.x or XL) that are adapted; the others stay out of the module tree.

    pipe: the pipeline; it computes with whatever adapter is active here. text_encoder: adapt it too.
    """

    pipe: Any

    def __init__(
        self, pipe: Any, text_encoder: bool = False, min_snr: float = 0.0, name: str = ""
    ) -> None:
        from diffusers import DDPMScheduler

        super().__init__(DDPMScheduler.from_config(pipe.scheduler.config), min_snr, name)
        self.unet = pipe.unet
        if text_encoder:
            for part in ("text_encoder", "text_encoder_2"):
                if getattr(pipe, part, None) is not None:
                    setattr(self, part, getattr(pipe, part))
        self.learns_text = text_encoder
        self.__dict__["pipe"] = (
            pipe  # not a child: the VAE and a frozen text encoder are nobody's targets
        )
        for frozen in (pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
            if frozen is not None:
                frozen.requires_grad_(False)
        pipe.set_progress_bar_config(disable=True)

    def latents(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae.to(pixels.device)
        found = vae.encode(pixels.to(vae.dtype)).latent_dist
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (
            (found.sample() if self.training else found.mode()) - shift
        ) * vae.config.scaling_factor

    def condition(self, captions: Sequence[str] | None, size: tuple[int, int]) -> Any:
        assert captions is not None
        device = next(self.unet.parameters()).device
        for part in (self.pipe.text_encoder, getattr(self.pipe, "text_encoder_2", None)):
            if part is not None:
                part.to(device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.learns_text):
            out = self.pipe.encode_prompt(
                list(captions),
                device=device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
        if len(out) == 2:
            return {"encoder_hidden_states": out[0]}
        words, _, pooled, _ = out  # SDXL: and sizes, as if the image had been cropped nowhere
        width = self.pipe.text_encoder_2.config.projection_dim
        ids = self.pipe._get_add_time_ids(
            size, (0, 0), size, dtype=words.dtype, text_encoder_projection_dim=width
        )
        more = {"text_embeds": pooled, "time_ids": ids.to(device).expand(len(words), -1)}
        return {"encoder_hidden_states": words, "added_cond_kwargs": more}

    def predict(self, noisy: Tensor, t: Tensor, condition: Any) -> Tensor:
        return self.unet(noisy, t, **condition).sample

    @torch.no_grad()
    def draw(
        self, count: int, prompts: Sequence[str], seed: int, steps: int, size: int
    ) -> list[list[Image.Image]]:
        self.pipe.to(next(self.unet.parameters()).device)
        out = []
        for prompt in prompts:
            generator = [torch.Generator().manual_seed(seed + i) for i in range(count)]
            out.append(
                self.pipe(
                    [prompt] * count,
                    generator=generator,
                    num_inference_steps=steps,
                    height=size,
                    width=size,
                ).images
            )
        return out

    def save_pretrained(self, folder: Path) -> None:
        """The pipeline with the weights as they are."""
        self.pipe.save_pretrained(folder)


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
    """What tasks that generate images have in common. The score is the loss; grids of samples are drawn at every checkpoint."""

    accepted_settings = ImageTask.accepted_settings | {"min_snr", "sample_steps"}

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
                f"min_snr is {min_snr} and sample_steps {sample_steps}; at least 0 and at least 1 are wanted"
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

    Targets query and value are the attention projections of the U-Net; "all-conv" adds its convolutions.
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
        config = _pipeline_config(model)
        if self.image_size is not None:
            return Pixels(self.image_size)
        side = config["unet"].get("sample_size") or 64
        return Pixels(side * 2 ** (len(config["vae"].get("block_out_channels", [0] * 4)) - 1))

    def load_model(self, model: str, processor: Any, **options: Any) -> nn.Module:
        pipe = _load_pipeline(model, **options)
        if not hasattr(pipe, "unet") or not hasattr(pipe, "encode_prompt"):
            raise UnsupportedError(
                f"{model} is a {type(pipe).__name__}; pipelines with a U-Net and a text encoder can be adapted (SD 1.x, 2.x, XL)"
            )
        return TextToImageModel(pipe, self.train_text_encoder, self.min_snr, model)


class UnconditionalImage(ImageGeneration):
    """Images without captions, on diffusers' DDPM pipelines (a UNet2DModel and its scheduler)."""

    name = "unconditional-image"
    roles = {"image": ("image", "img")}

    def load_processor(self, model: str) -> Pixels:
        config = _pipeline_config(model)["unet"]
        return Pixels(
            self.image_size or config.get("sample_size") or 64, config.get("in_channels", 3)
        )

    def load_model(self, model: str, processor: Any, **options: Any) -> nn.Module:
        pipe = _load_pipeline(model, **options)
        if not hasattr(pipe, "unet") or hasattr(pipe, "text_encoder"):
            raise UnsupportedError(
                f"{model} is a {type(pipe).__name__}; a pipeline of a U-Net and a scheduler alone is wanted"
            )
        return Unconditional(pipe.unet, pipe.scheduler, processor.channels, self.min_snr, model)


def load_style(pipe: Any, path: str | Path, name: str = "style") -> TextToImageModel:
    """Put an adapter of the task text-to-image into a diffusers pipeline, which draws with it from then on.

    Returns the model that holds it: give that to `veratune.use`, `rows`, `merge` and `detach`. Raises AdapterFileError, BaseModelError.

    >>> model = load_style(pipe, "style.safetensors")  # doctest: +SKIP
    >>> pipe("a photo of a sks dog").images[0]  # doctest: +SKIP
    """
    adapter: Adapter = native.read(path)
    model = TextToImageModel(pipe, bool(adapter.task.get("train_text_encoder", False)))
    install(model, adapter, name)
    return model


def loading_pipeline(model: str) -> Any:
    """`loading`, for a folder of diffusers'."""
    return loading(model, "model_index.json")


def _pipeline_config(model: str) -> dict[str, dict[str, Any]]:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with loading_pipeline(model):
        unet = UNet2DConditionModel.load_config(model, subfolder="unet")
    try:
        vae = AutoencoderKL.load_config(model, subfolder="vae")
    except OSError:
        vae = {}
    return {"unet": dict(unet), "vae": dict(vae)}


def _load_pipeline(model: str, dtype: str = "float32", quantize: str | None = None) -> Any:
    if quantize:
        raise UnsupportedError(
            "quantize is for language models; diffusion pipelines are loaded in base_dtype"
        )
    from diffusers import DiffusionPipeline

    with loading_pipeline(model):
        return DiffusionPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
