"""Base models without weights, for commands that need their layers alone."""

from pathlib import Path

import torch
from torch import nn


def empty_base(model: str) -> nn.Module:
    """A base model on the meta device: a transformers model, or a diffusers pipeline's parts.

    Args:
        model: A config.json, a folder, a .gguf file or a hub id.

    Raises:
        DataError: There is no configuration.
    """
    from veratune.analysis.count import empty_model

    if not (Path(model) / "model_index.json").is_file():
        return empty_model(model)
    import transformers
    from diffusers import UNet2DConditionModel

    from veratune.loading import loading_errors

    parts = nn.ModuleDict()
    with loading_errors(model, "model_index.json"), torch.device("meta"):
        parts["unet"] = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(model, subfolder="unet")
        )
        for name in ("text_encoder", "text_encoder_2"):
            if (Path(model) / name).is_dir():
                config = transformers.AutoConfig.from_pretrained(Path(model) / name)
                kind = getattr(transformers, (config.architectures or ["CLIPTextModel"])[0])
                parts[name] = kind(config)
    return parts
