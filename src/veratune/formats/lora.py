"""A trained LoRA as the frozen basis of an adapter: PEFT folders, and single files in PEFT's, diffusers' and kohya's names.

    PEFT        base_model.model.<layer>.lora_A.weight, .lora_B.weight      alpha in adapter_config.json
    diffusers   unet.<layer>.lora_A.weight (or .lora.down.weight)           .alpha beside them, or alpha = r
    kohya       lora_unet_<layer with _ for .>.lora_down.weight             .alpha beside them

B is multiplied by alpha / r. A convolution's A of shape (r, n, k, k) and B of (m, r, 1, 1) are read as matrices.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from veratune.basis.lora import LoraBasis
from veratune.errors import AdapterFileError, BaseModelError, UnsupportedError, near
from veratune.targets import layers_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(
    r"(?P<layer>.+?)\.(?:lora_(?P<one>[AB])(?:\.\w+)?|lora[._](?P<two>down|up))\.weight"
)
_PREFIXES = (
    "base_model.model.",
    "lora_unet_",
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "lora_transformer_",
)


def read_lora(path: str | Path, model: nn.Module) -> LoraBasis:
    """The matrices of a LoRA for `model`, to attach vectors over: `attach(model, VeraConfig(basis="lora"), basis=...)`.

    path: a PEFT folder or a .safetensors file. model: tells the layers' names apart; give the module that the file speaks of,
    or one that holds it (a pipeline's U-Net under the name "unet").
    Raises AdapterFileError (not a LoRA, half a pair), UnsupportedError (DoRA, trained biases), BaseModelError (layers that the
    model does not have).
    """
    path = Path(path)
    config: dict[str, Any] = {}
    file = path
    if path.is_dir():
        file = path / WEIGHTS
        try:
            config = json.loads((path / CONFIG).read_text())
        except (OSError, ValueError) as error:
            raise AdapterFileError(f"{path}: no readable {CONFIG}: {error}") from None
    try:
        tensors = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterFileError(f"{file}: not a whole safetensors file ({error})") from None
    known = {name: name for name, _ in layers_of(model)}
    flat = {name.replace(".", "_"): name for name in known}
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            pairs.setdefault(key.removesuffix(".alpha"), {})["alpha"] = tensor
            continue
        found = _KEY.fullmatch(key)
        if found is None:
            what = (
                "DoRA's magnitudes"
                if "magnitude" in key or "dora_scale" in key
                else f"the tensor {key!r}"
            )
            raise UnsupportedError(f"{path}: it has {what}; only plain LoRA pairs can be a basis")
        side = found["one"] or {"down": "A", "up": "B"}[found["two"]]
        if not torch.isfinite(tensor).all():
            raise AdapterFileError(f"{path}: {key!r} holds NaN or infinity")
        pairs.setdefault(found["layer"], {})[side] = tensor
    out = {}
    for stored, held in pairs.items():
        if "A" not in held or "B" not in held:
            raise AdapterFileError(
                f"{path}: layer '{stored}' has no {'A' if 'A' not in held else 'B'} (down and up make a pair)"
            )
        layer = _layer(stored, known, flat)
        if layer is None:
            layer = stored.removeprefix(_PREFIXES[0])
            raise BaseModelError(
                f"{path}: the LoRA has layer '{layer}', {type(model).__name__} has not{near(layer, known)}"
            )
        A, B = held["A"].flatten(1).float(), held["B"].flatten(1).float()
        alpha = float(held["alpha"]) if "alpha" in held else _alpha(config, layer, A.shape[0])
        out[layer] = (
            A,
            B * (alpha / (math.sqrt(A.shape[0]) if config.get("use_rslora") else A.shape[0])),
        )
    if not out:
        raise AdapterFileError(f"{path}: no LoRA pair in it")
    return LoraBasis(out)


def _layer(stored: str, known: dict[str, str], flat: dict[str, str]) -> str | None:
    """The model's own name of a layer: as it stands, without the prefixes of tools, or inside or outside a wrapper."""
    forms = [stored, *(stored.removeprefix(p) for p in _PREFIXES if stored.startswith(p))]
    forms += [
        form.partition(".")[2]
        for form in forms
        if form.startswith(("unet.", "transformer.", "text_encoder."))
    ]
    forms += [f"unet.{form}" for form in forms] + [f"text_encoder.{form}" for form in forms]
    forms += [f"unet_{form}" for form in forms] + [
        f"text_encoder_{form}" for form in forms if not form.startswith("unet")
    ]
    return next((table[form] for form in forms for table in (known, flat) if form in table), None)


def _alpha(config: dict[str, Any], layer: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    for pattern, alpha in patterns.items():
        if re.search(rf"(^|\.){pattern}$", layer):
            return float(alpha)
    return float(config.get("lora_alpha", rank))
