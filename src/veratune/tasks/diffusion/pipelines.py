"""diffusers pipelines: loading one, and putting an adapter into one that is loaded."""

from pathlib import Path
from typing import Any

import torch

from veratune.adapter import Adapter, install
from veratune.errors import UnsupportedError
from veratune.formats import native
from veratune.loading import loading_errors
from veratune.tasks.diffusion.models import TextToImageModel


def load_style(pipe: Any, path: str | Path, name: str = "style") -> TextToImageModel:
    """Put an adapter of the task text-to-image into a diffusers pipeline, which draws with it from
    then on.

    Returns the model that holds it: give that to `veratune.use`, `rows`, `merge` and `detach`.
    Raises AdapterFileError, BaseModelError.

    >>> model = load_style(pipe, "style.safetensors")  # doctest: +SKIP
    >>> pipe("a photo of a sks dog").images[0]  # doctest: +SKIP
    """
    adapter: Adapter = native.read(path)
    model = TextToImageModel(pipe, bool(adapter.task.get("train_text_encoder", False)))
    install(model, adapter, name)
    return model


def pipeline_config(model: str) -> dict[str, dict[str, Any]]:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with loading_errors(model, "model_index.json"):
        unet = UNet2DConditionModel.load_config(model, subfolder="unet")
    try:
        vae = AutoencoderKL.load_config(model, subfolder="vae")
    except OSError:
        vae = {}
    return {"unet": dict(unet), "vae": dict(vae)}


def load_pipeline(model: str, dtype: str = "float32", quantize: str | None = None) -> Any:
    if quantize:
        raise UnsupportedError(
            "quantize is for language models; diffusion pipelines are loaded in base_dtype"
        )
    from diffusers import DiffusionPipeline

    with loading_errors(model, "model_index.json"):
        return DiffusionPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
