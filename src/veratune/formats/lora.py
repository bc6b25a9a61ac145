"""Read a trained LoRA: PEFT folders, and single files with PEFT's, diffusers' or kohya's names.

    PEFT        base_model.model.<layer>.lora_A.weight      alpha in adapter_config.json
    diffusers   unet.<layer>.lora_A.weight                  .alpha beside them, or alpha = r
                unet.<layer>.lora.down.weight
    kohya       lora_unet_<layer, . as _>.lora_down.weight  .alpha beside them

B is multiplied by alpha / r. A convolution's A of shape (r, n, k, k) and B of (m, r, 1, 1) are read
as matrices.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from veratune.basis.lora import LoraBasis
from veratune.errors import AdapterFileError, BaseModelError, UnsupportedError, near
from veratune.formats.peft_files import (
    CONFIG_NAME,
    KEY_PREFIX,
    WEIGHTS_NAME,
    read_settings,
)
from veratune.targets import layers_of

_KEY = re.compile(
    r"(?P<layer>.+?)\.(?:lora_(?P<peft>[AB])(?:\.\w+)?|lora[._](?P<kohya>down|up))\.weight"
)
_PREFIXES = (
    KEY_PREFIX,
    "lora_unet_",
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "lora_transformer_",
)


@dataclasses.dataclass
class _Stored:
    """The tensors of one layer in a file."""

    A: Tensor | None = None
    B: Tensor | None = None
    alpha: float | None = None


def read_lora(path: str | Path, model: nn.Module) -> LoraBasis:
    """Read a trained LoRA, for `attach(model, VeraConfig(basis="lora"), basis=...)`.

    Args:
        path: A PEFT folder or a .safetensors file.
        model: The model that the LoRA adapts, or one that holds it (a pipeline's U-Net under the
            name "unet"). The meta device will do.

    Returns:
        (A, B) of each layer, with alpha / r multiplied into B.

    Raises:
        AdapterFileError: Not a LoRA, or half of a pair.
        UnsupportedError: DoRA, trained biases, or experts.
        BaseModelError: The model lacks a layer.
    """
    path = Path(path)
    config, stored = _read(path)
    names = _Names(model)
    pairs = {}
    for key, entry in stored.items():
        layer = names.find(key)
        if layer is None:
            name = key.removeprefix(KEY_PREFIX)
            raise BaseModelError(
                f"{path}: the LoRA has layer '{name}', {type(model).__name__} has not"
                f"{near(name, names.paths)}"
            )
        if entry.A is None or entry.B is None:
            raise AdapterFileError(
                f"{path}: layer '{key}' has no {'A' if entry.A is None else 'B'} "
                "(down and up make a pair)"
            )
        if entry.A.dim() < 2 or entry.B.dim() < 2 or entry.A.shape[0] != entry.B.shape[1]:
            raise AdapterFileError(
                f"{path}: layer '{key}' has A {tuple(entry.A.shape)} and B {tuple(entry.B.shape)}; "
                "(r, n) and (m, r) are wanted"
            )
        A, B = entry.A.flatten(1).float(), entry.B.flatten(1).float()
        rank = A.shape[0]
        alpha = _alpha(config, layer, rank) if entry.alpha is None else entry.alpha
        pairs[layer] = (A, B * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)))
    if not pairs:
        raise AdapterFileError(f"{path}: no LoRA pair in it")
    return LoraBasis(pairs)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, _Stored]]:
    """The configuration (empty for a single file), and the tensors by layer as stored."""
    config: dict[str, Any] = {}
    file = path
    if path.is_dir():
        file = path / WEIGHTS_NAME
        try:
            config = read_settings(path)
        except AdapterFileError as error:
            raise AdapterFileError(f"{path}: {error}") from None
        if config.get("target_parameters"):
            raise UnsupportedError(
                f"{path}: the LoRA adapts weights of experts (target_parameters); only a LoRA of "
                "layers is read"
            )
    try:
        tensors = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterFileError(f"{file}: not a whole safetensors file ({error})") from None
    stored: dict[str, _Stored] = {}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterFileError(f"{path}: {key!r} holds NaN or infinity")
        if key.endswith(".alpha"):
            if tensor.numel() != 1:
                raise AdapterFileError(f"{path}: {key!r} has {tensor.numel()} values; 1 is wanted")
            stored.setdefault(key.removesuffix(".alpha"), _Stored()).alpha = float(tensor)
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            dora = "magnitude" in key or "dora_scale" in key
            what = "DoRA's magnitudes" if dora else f"the tensor {key!r}"
            raise UnsupportedError(f"{path}: it has {what}; only plain LoRA pairs can be a basis")
        entry = stored.setdefault(match["layer"], _Stored())
        if match["peft"] == "A" or match["kohya"] == "down":
            entry.A = tensor
        else:
            entry.B = tensor
    return config, stored


class _Names:
    """Finds a model's layer by the name that a file gives it."""

    def __init__(self, model: nn.Module) -> None:
        self.paths: Mapping[str, str] = {name: name for name, _ in layers_of(model)}
        self._flat = {name.replace(".", "_"): name for name in self.paths}

    def find(self, stored: str) -> str | None:
        """The path of a layer: as stored, without a prefix, or inside or outside a wrapper."""
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
        for form in forms:
            for table in (self.paths, self._flat):
                if form in table:
                    return table[form]
        return None


def _alpha(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """PEFT's alpha of a layer: the first entry of alpha_pattern that matches, or lora_alpha."""
    found = config.get("lora_alpha", rank)
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        name = str(pattern).removeprefix("^").removesuffix("$")
        if not re.fullmatch(r"[\w.-]+", name):  # a file's regular expression is never evaluated
            raise UnsupportedError(
                f"alpha_pattern has the regular expression {pattern!r}; only layer names are read"
            )
        if f".{layer}".endswith(f".{name}"):
            found = alpha
            break
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise AdapterFileError(
            f"{CONFIG_NAME} has alpha {found!r} for '{layer}'; a number is wanted"
        )
    return float(found)
