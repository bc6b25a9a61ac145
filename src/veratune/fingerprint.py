"""Fingerprints of a base model's weights: is this the model that an adapter was trained on?"""

import sys

import torch
from torch import Tensor, nn

from veratune.layers.kinds import weight_matrix
from veratune.layers.quantized import dense_weight, is_dense
from veratune.layers.wrapper import VeraLayer
from veratune.targets import Site, base_module

FINGERPRINT_VALUES = 64  # of `weight_fingerprint`
BASE_VALUES = 512  # of `base_fingerprint`, over all weights
_PER_WEIGHT = 4
_WINDOW = 64  # consecutive weights whose sum is one value
_STEPS = 16  # of an int8 for one standard deviation
_UNREADABLE = -128
_TOLERANCE = 0.2  # mean square; about 0.02 for weights rounded to 4 bits, about 2 for others


def weight_fingerprint(model: nn.Module, sites: list[Site]) -> Tensor | None:
    """Return a sample of the first adapted layer (by name), (64,) in bfloat16.

    Args:
        model: The model; a merged adapter is not seen.
        sites: The adapted matrices.

    Returns:
        The sample, or None for weights that are sharded, on the meta device, or unreadable.
    """
    site = min(sites, key=lambda s: s.name)
    base = base_module(model, site.module)
    unmerged = _unmerged(model.get_submodule(site.module), site.part.parameter)
    weight = unmerged if unmerged is not None else dense_weight(base, site.part.parameter)
    if weight is None or weight.device.type == "meta" or weight.numel() == 0:
        return None
    flat = weight_matrix(base, weight).reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, FINGERPRINT_VALUES, dtype=torch.float64).long()
    return flat[index].to("cpu", torch.bfloat16)


@torch.no_grad()
def base_fingerprint(model: nn.Module, heads: list[str]) -> Tensor | None:
    """Return a sample of all weight matrices of the base model, (weights, k) in int8.

    Each value is the sum of 64 consecutive weights over sqrt(64) times their root mean square, in
    sixteenths: about normal, and hardly moved by rounding or quantizing the weights. -128 stands
    for a weight that cannot be read (quantized) and equals anything.

    Args:
        model: The model, with or without adapters; merged ones are not seen. Under FSDP2 or
            ZeRO-3 every rank must call.
        heads: Paths of modules that are trained in full and do not count.

    Returns:
        The sample, or None for a quantized model, one on the meta device, or without matrices. k is
        4, or fewer for models with over 128 matrices; at most 512 matrices are sampled.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return None  # some quantized layers hide their weights, so matrices cannot be counted
    weights = _base_weights(model, heads)
    if not weights or any(weight.device.type == "meta" for weight in weights):
        return None
    count, chosen = _sample(len(weights))
    windows = [_windows(weights[i], count) for i in chosen]
    stacked = torch.stack([window.to(windows[0].device) for window in windows])
    scale = stacked.square().mean(-1).sqrt().clamp(min=1e-12) * _WINDOW**0.5
    values = (stacked.sum(-1) / scale * _STEPS).round().clamp(-127, 127)
    return values.nan_to_num(_UNREADABLE).to("cpu", torch.int8)


def fingerprint_shape(model: nn.Module, heads: list[str]) -> tuple[int, int]:
    """Return the shape of a model's `base_fingerprint`; the meta device is enough."""
    count, chosen = _sample(max(len(_base_weights(model, heads)), 1))
    return len(chosen), count


def differing_weights(found: Tensor | None, wanted: Tensor | None) -> float:
    """Return the share of weight matrices that two base fingerprints disagree on, 0 to 1.

    Fingerprints of models with another number of matrices disagree altogether; None agrees with
    anything.
    """
    if found is None or wanted is None:
        return 0.0
    if found.shape != wanted.shape:
        return 1.0
    readable = (found != _UNREADABLE) & (wanted != _UNREADABLE)
    distance = (found.float() - wanted.float()) / _STEPS * readable
    return (distance.square().mean(1) > _TOLERANCE).float().mean().item()


def _sample(weights: int) -> tuple[int, list[int]]:
    """Values of each matrix, and which of the matrices are sampled."""
    count = max(1, min(_PER_WEIGHT, BASE_VALUES // weights))
    if weights <= BASE_VALUES:
        return count, list(range(weights))
    return count, [i * (weights - 1) // (BASE_VALUES - 1) for i in range(BASE_VALUES)]


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor whole, gathered from all ranks where FSDP2 or ZeRO-3 has sharded it."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    if _is_partitioned(tensor):
        zero = sys.modules["deepspeed"].zero  # whose tensor it is
        with zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


def _is_partitioned(tensor: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds a part of it on each rank, and an empty tensor in place."""
    return tensor.numel() == 0 and getattr(tensor, "ds_numel", 0) > 0


def _base_weights(model: nn.Module, heads: list[str]) -> list[Tensor]:
    """The base model's matrices by name, each once, as they were before any merge."""
    out: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        inside = any(f"{path}.".startswith(f"{head}.") for head in heads)
        if inside or isinstance(module, VeraLayer) or ".vera." in f".{path}.":
            continue
        wrapper = _wrapper(model, path)
        for name, parameter in module._parameters.items():
            if parameter is not None and len(getattr(parameter, "ds_shape", parameter.shape)) > 1:
                unmerged = _unmerged(wrapper, name)
                out.setdefault(id(parameter), parameter if unmerged is None else unmerged)
    return list(out.values())


def _wrapper(model: nn.Module, path: str) -> nn.Module | None:
    parent, _, last = path.rpartition(".")
    return model.get_submodule(parent) if last == "base" else None


def _unmerged(module: nn.Module | None, parameter: str) -> Tensor | None:
    """The weight from before a merge, which the layer keeps."""
    kept: dict[str, Tensor] = getattr(module, "weights_before_merge", {}) if module else {}
    return kept.get(parameter)


def _windows(weight: Tensor, count: int) -> Tensor:
    """`count` windows of consecutive weights, (count, 64); NaN for a weight that is not dense."""
    whole = full_tensor(weight)  # sharded by FSDP2 or ZeRO-3: gathered by all ranks
    if whole is not weight:
        weight = whole
    elif not is_dense(weight):
        return torch.full((count, _WINDOW), torch.nan, device=weight.device)
    return _take(weight.reshape(-1), count)


def _take(flat: Tensor, count: int) -> Tensor:
    last = max(flat.numel() - _WINDOW, 0)
    starts = torch.linspace(0, last, count, dtype=torch.float64, device=flat.device).long()
    index = starts[:, None] + torch.arange(_WINDOW, device=flat.device)
    return flat[index.clamp_(max=flat.numel() - 1)].float()
