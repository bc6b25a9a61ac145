"""Fingerprints of a base model's weights: is this the model that an adapter was trained on?"""

import torch
from torch import Tensor, nn

from veratune.layers.base import VeraLayer
from veratune.layers.quantized import dense_weight, is_dense
from veratune.targets import Site, base_module

FINGERPRINT_VALUES = 64  # of `weight_fingerprint`
BASE_VALUES = 512  # of `base_fingerprint`, over all weights
_PER_WEIGHT = 4
_WINDOW = 64  # consecutive weights of which a fingerprint holds the largest


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
    if weight is None or weight.device.type == "meta":
        return None
    flat = (weight if not hasattr(base, "nf") else weight.T).reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, FINGERPRINT_VALUES, dtype=torch.float64).long()
    return flat[index].to("cpu", torch.bfloat16)


@torch.no_grad()
def base_fingerprint(model: nn.Module, heads: list[str]) -> Tensor | None:
    """Return a sample of all weight matrices of the base model, (weights, k) in bfloat16.

    Each value is the largest of 64 consecutive weights (with its sign): rounding to 16 bits or
    quantizing hardly moves it. A weight that cannot be read (quantized) gives NaN, which equals
    anything.

    Args:
        model: The model, with or without adapters; merged ones are not seen. Under FSDP every rank
            must call.
        heads: Paths of modules that are trained in full and do not count.

    Returns:
        The sample, or None for a quantized model, one on the meta device, or without matrices. k is 4, or fewer
        for models with over 128 matrices.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return None  # some quantized layers hide their weights, so matrices cannot be counted
    weights = _base_weights(model, heads)
    if not weights or any(weight.device.type == "meta" for weight in weights):
        return None
    count = max(1, min(_PER_WEIGHT, BASE_VALUES // len(weights)))
    if len(weights) > BASE_VALUES:
        chosen = torch.linspace(0, len(weights) - 1, BASE_VALUES, dtype=torch.float64).long()
        weights = [weights[i] for i in chosen.tolist()]
    windows: list[Tensor] = []
    for weight in weights:
        windows.append(_windows(weight, count))
    return _reduce(windows).to("cpu", torch.bfloat16)


def differing_weights(found: Tensor | None, wanted: Tensor | None) -> float:
    """Return the share of weight matrices that two base fingerprints disagree on, 0 to 1.

    A matrix differs where half of its values are over three tenths apart. Fingerprints of
    models with another number of matrices disagree altogether; None agrees with anything.
    """
    if found is None or wanted is None:
        return 0.0
    if found.shape != wanted.shape:
        return 1.0
    a, b = found.float(), wanted.float()
    apart = (a - b).abs() > 0.3 * torch.maximum(a.abs(), b.abs())  # False for NaN
    return (apart.float().mean(1) >= 0.5).float().mean().item()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor whole, gathered from all ranks where FSDP has sharded it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _base_weights(model: nn.Module, heads: list[str]) -> list[Tensor]:
    """The base model's matrices by name, each once, as they were before any merge."""
    out: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        inside = any(f"{path}.".startswith(f"{head}.") for head in heads)
        if inside or isinstance(module, VeraLayer) or ".vera." in f".{path}.":
            continue
        wrapper = _wrapper(model, path)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() > 1:
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
    local = getattr(weight, "_local_tensor", None)
    if local is not None:
        return _sharded_windows(weight, count)
    if not is_dense(weight):
        return torch.full((count, _WINDOW), torch.nan, device=weight.device)
    return _take(weight.reshape(-1), count)


def _take(flat: Tensor, count: int) -> Tensor:
    last = max(flat.numel() - _WINDOW, 0)
    starts = torch.linspace(0, last, count, dtype=torch.float64, device=flat.device).long()
    index = starts[:, None] + torch.arange(_WINDOW, device=flat.device)
    return flat[index.clamp_(max=flat.numel() - 1)].float()


def _sharded_windows(weight: Tensor, count: int) -> Tensor:
    """The windows of a DTensor, gathered by all ranks.

    A weight that is sharded by rows, as FSDP2 does, sends its windows alone; any other is gathered
    whole.
    """
    return _take(full_tensor(weight).reshape(-1), count)


def _reduce(windows: list[Tensor]) -> Tensor:
    """The value of largest magnitude in each window, (weights, count)."""
    stacked = torch.stack([window.to(windows[0].device) for window in windows])
    position = stacked.abs().argmax(-1, keepdim=True)
    return stacked.gather(-1, position).squeeze(-1)
