"""Denoising diffusion models as a trainer calls them.

    Diffusion (abstract)
    ├── Unconditional      epsilon from a noisy image and its step
    └── TextToImageModel   a pipeline's U-Net with its captions, and optionally its text encoders

The loss is the mean of |target - f(x_t, t)|² over pixels. The target is the noise or, for a
scheduler with v-prediction, the velocity. Min-SNR weights are optional.

Source: Ho et al. (arXiv 2006.11239), equation 14; velocity: arXiv 2202.00512; min-SNR: arXiv
2303.09556.
"""

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PretrainedConfig


class Diffusion(nn.Module, abc.ABC):
    """A denoising model as a trainer calls it: {"loss"} of a batch of images.

    scheduler: diffusers', for the noise and the steps. min_snr: gamma of the min-SNR weights; 0 for
    none. Rows with an index draw their step and noise from it in evaluation, so that its loss is
    comparable from one evaluation to the next.
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
        """The tensor that is noised: images in [-1, 1], or their VAE latents."""
        return pixels

    def condition(self, captions: Sequence[str] | None, size: tuple[int, int]) -> Any:
        """The conditioning of `predict`, such as text embeddings."""
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
    """The parts of a Stable Diffusion pipeline (1.x, 2.x or XL) that are adapted; the others stay
    out of the module tree.

    pipe: the pipeline; it computes with whatever adapter is active here. text_encoder: adapt it
    too.
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
