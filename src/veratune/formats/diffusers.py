"""LoRA files for image programs: diffusers' names, and kohya's (ComfyUI, A1111).

    diffusers   unet.<layer>.lora_A.weight, .lora_B.weight; text_encoder.<layer>...
    kohya       lora_unet_<layer, . as _>.lora_down.weight, .lora_up.weight, .alpha; lora_te_...

alpha is r, so that a program's alpha / r is 1. One file holds one style of names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor

from veratune.adapter import Adapter
from veratune.errors import UnsupportedError
from veratune.formats.atomic import write_atomic
from veratune.formats.lora_matrices import LoraPair

Style = Literal["diffusers", "kohya"]
# kohya numbers the text encoders of a pipeline that has two.
_KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


def write_image_lora(
    adapter: Adapter, pairs: Mapping[str, LoraPair], path: str | Path, style: Style
) -> None:
    """Write an image adapter as one LoRA file.

    Args:
        adapter: The adapter; its layers begin with `unet.`, `text_encoder.` or `text_encoder_2.`.
        pairs: Its LoRA pairs (see `lora_pairs`), possibly reduced.
        path: The .safetensors file.
        style: The names in the file.

    Raises:
        UnsupportedError: A layer of another component, or a trained head.
        OutputError: The file cannot be written.
    """
    if adapter.head:
        raise UnsupportedError(
            f"LoRA files hold no trained head, and the adapter has {', '.join(adapter.config.head)}"
        )
    two_encoders = any(layer.startswith("text_encoder_2.") for layer in pairs)
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        component, _, layer = name.partition(".")
        if component not in _KOHYA:
            raise UnsupportedError(
                f"layer '{name}' is not of a U-Net or a text encoder; {style} files hold only those"
            )
        A, B = pair.A, pair.B
        if pair.kernel:
            A = A.reshape(pair.rank, -1, *pair.kernel)
            B = B.reshape(*B.shape, *(1 for _ in pair.kernel))
        if style == "diffusers":
            tensors[f"{name}.lora_A.weight"] = A.contiguous()
            tensors[f"{name}.lora_B.weight"] = B.contiguous()
            continue
        prefix = _KOHYA[component]
        if component == "text_encoder" and two_encoders:
            prefix = "lora_te1"
        if component != "unet" and not layer.startswith("text_model."):
            # transformers 5 dropped the level that kohya's names have.
            layer = f"text_model.{layer}"
        key = f"{prefix}_{layer.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = A.contiguous()
        tensors[f"{key}.lora_up.weight"] = B.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(pair.rank))
    write_atomic(Path(path), safetensors.torch.save(tensors, {"format": "pt"}))
