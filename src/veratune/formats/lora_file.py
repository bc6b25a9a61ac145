"""A PEFT LoRA checkpoint as one file: its safetensors with adapter_config.json as metadata.

Reading is strict. A field or tensor that changes the result and is not read here is refused by
name, so that a LoRA never computes something else than in PEFT.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from veratune.adapter import Adapter
from veratune.basis.lora import LoraBasis
from veratune.config import VeraConfig
from veratune.errors import AdapterFileError, UnsupportedError
from veratune.formats.container import UNREADABLE
from veratune.formats.peft_files import CONFIG_NAME, KEY_PREFIX, WEIGHTS_NAME

_ENTRY = "adapter_config"
_START = b'{"__metadata__":{"adapter_config":'
MAX_CONFIG_BYTES = 2**20
_MAX_LAYERS = 2**14
_MAX_RANK = 2**16
_KEY = re.compile(r"(?P<layer>[^\s]{1,512})\.lora_(?P<kind>[AB])\.weight")
_NAME = re.compile(r"\^?[\w.-]+\$?")
# Fields of peft.LoraConfig that are read here, and those that change training alone.
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern"}
_TRAINING = {
    "arrow_config", "auto_mapping", "base_model_name_or_path", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type",
}  # fmt: skip
# Initialisations that also change the base model's weights, which this file does not hold.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_lora_file(data: bytes) -> bool:
    """Whether bytes are a file as `pack_lora` writes it."""
    return data[8 : 8 + len(_START)] == _START


def pack_lora(config: bytes, weights: bytes) -> bytes:
    """Put the two files of a PEFT LoRA checkpoint into one, checked.

    Args:
        config: Content of adapter_config.json.
        weights: Content of adapter_model.safetensors.

    Raises:
        AdapterFileError: A file is damaged.
        UnsupportedError: Something that this server would not compute as PEFT does.
    """
    settings = json.dumps(_settings(config), sort_keys=True)
    data = safetensors.torch.save(_tensors(weights), {_ENTRY: settings})
    decode_lora(data)
    return data


def decode_lora(data: bytes) -> Adapter:
    """Read a LoRA: ΔW = alpha / r B A, or alpha / sqrt(r) B A with rslora.

    Args:
        data: A file as `pack_lora` writes it.

    Returns:
        The adapter, bound to its A and B; d is all ones.

    Raises:
        AdapterFileError: The file is damaged, or half of a pair is missing.
        UnsupportedError: Names the field or tensor that is not done.
    """
    tensors = _tensors(data)
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    settings = _settings(str(entries.get(_ENTRY, "")).encode())
    stored: dict[str, dict[str, Tensor]] = {}
    refused = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key.removeprefix(KEY_PREFIX))
        if match is None or not key.startswith(KEY_PREFIX):
            refused.append(key)
        else:
            stored.setdefault(match["layer"], {})[match["kind"]] = tensor
    if refused:
        # The order of a file's tensors is none: name one of the LoRA before one of the base model.
        key = min(refused, key=lambda key: ("lora_" not in key, key))
        raise UnsupportedError(
            f"{WEIGHTS_NAME} has the tensor {key[:200]!r}; only lora_A and lora_B of linear "
            "layers are served"
        )
    if not 0 < len(stored) <= _MAX_LAYERS:
        raise AdapterFileError(
            f"{WEIGHTS_NAME} has {len(stored)} layers; 1 to {_MAX_LAYERS:,} are wanted"
        )
    pairs = {layer: _pair(settings, layer, pair) for layer, pair in sorted(stored.items())}
    ranks = {layer: A.shape[0] for layer, (A, _) in pairs.items()}
    return Adapter(
        config=VeraConfig(
            rank=max(ranks.values()), targets=tuple(pairs), basis="lora", vectors="d", fused="whole"
        ),
        shapes={layer: (B.shape[0], A.shape[1]) for layer, (A, B) in pairs.items()},
        d={layer: torch.ones(rank) for layer, rank in ranks.items()},
        b={},
        base_id=str(settings.get("base_model_name_or_path") or "")[:200],
        layer_ranks=ranks,
        bound=LoraBasis(pairs),
    )


def _settings(config: bytes) -> dict[str, Any]:
    """The checked content of adapter_config.json."""
    if len(config) > MAX_CONFIG_BYTES:
        raise AdapterFileError(
            f"{CONFIG_NAME} has {len(config):,} bytes; at most {MAX_CONFIG_BYTES:,} are read"
        )
    try:
        settings = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{CONFIG_NAME} is not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise AdapterFileError(f"{CONFIG_NAME} is not a JSON object")
    if settings.get("peft_type") != "LORA":
        raise UnsupportedError(
            f"{CONFIG_NAME} has peft_type {str(settings.get('peft_type'))[:40]!r}; LORA is wanted"
        )
    for name, value in settings.items():
        if name in _READ or name in _TRAINING or value in (None, False, [], {}, "none"):
            continue
        raise UnsupportedError(
            f"{CONFIG_NAME} has {name[:80]}={str(value)[:80]!r}, which is not served; merge the "
            "LoRA, or save it without"
        )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_BASE):
        raise UnsupportedError(
            f"{CONFIG_NAME} has init_lora_weights={start[:40]!r}, which changes the base model's "
            "weights; convert it (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if not isinstance(settings.get("use_rslora", False), bool | None):
        raise AdapterFileError(f"{CONFIG_NAME} has use_rslora that is neither true nor false")
    return settings


def _tensors(data: bytes) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except UNREADABLE as error:
        raise AdapterFileError(
            f"{WEIGHTS_NAME} is not a whole safetensors file ({error})"
        ) from None
    for key, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise AdapterFileError(
                f"tensor {key[:200]!r} is {tensor.dtype}; a float of 16 or 32 bits is wanted"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(f"tensor {key[:200]!r} holds NaN or infinity")
    return tensors


def _pair(
    settings: Mapping[str, Any], layer: str, pair: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """(A, B) of a layer in float32, the scale multiplied into B."""
    if len(pair) != 2:
        raise AdapterFileError(f"layer '{layer}' has no lora_{'B' if 'A' in pair else 'A'}")
    A, B = pair["A"].float(), pair["B"].float()
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or not 0 < len(A) <= _MAX_RANK:
        raise UnsupportedError(
            f"layer '{layer}' has A {tuple(A.shape)} and B {tuple(B.shape)}; (r, n) and (m, r) of "
            "a linear layer are wanted"
        )
    rank = len(A)
    told = _of_layer(settings, "rank_pattern", layer, settings.get("r", rank))
    if told != rank:
        raise AdapterFileError(
            f"layer '{layer}' has rank {rank}, {CONFIG_NAME} says {str(told)[:40]}"
        )
    alpha = _of_layer(settings, "alpha_pattern", layer, settings.get("lora_alpha", 8))
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    scaled = B * scale
    if not math.isfinite(scale) or not bool(torch.isfinite(scaled).all()):
        raise AdapterFileError(f"layer '{layer}': lora_alpha {alpha} makes B infinite")
    return A, scaled


def _of_layer(settings: Mapping[str, Any], field: str, layer: str, default: Any) -> float:
    """A layer's value: PEFT's first pattern that matches it, or the default.

    PEFT matches `(.*\\.)?(pattern)$`. A stranger's regular expression is never evaluated: only
    names are read.
    """
    patterns = settings.get(field) or {}
    if not isinstance(patterns, dict):
        raise AdapterFileError(f"{CONFIG_NAME}: {field} is no JSON object")
    found = default
    for pattern, value in patterns.items():
        if not _NAME.fullmatch(pattern):
            raise UnsupportedError(
                f"{field} has the regular expression {pattern[:80]!r}; only layer names are read"
            )
        if _matches(pattern.removesuffix("$"), layer):
            found = value
            break
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise AdapterFileError(
            f"{CONFIG_NAME}: {field} of '{layer}' is {str(found)[:40]!r}; a number is wanted"
        )
    return found


def _matches(name: str, layer: str) -> bool:
    """Whether PEFT's expression of a name matches a layer; its "." stands for any character."""
    if name.startswith("^"):
        name, before = name[1:], ""
        if len(name) != len(layer):
            return False
    else:
        before = layer[: -len(name)]
    end = layer[len(before) :]
    return (
        len(end) == len(name)
        and (not before or before.endswith("."))
        and all(a in (".", b) for a, b in zip(name, end, strict=True))
    )
