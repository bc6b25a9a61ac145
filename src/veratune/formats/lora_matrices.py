"""An adapter as LoRA, exactly: ΔW = diag(b) B diag(d) A is a product of two matrices of rank r.

    lora_A = A (r, n)        lora_B = s diag(b) B diag(d) (m, r)        alpha = r

The parts of a fused layer become one LoRA. Parts with the same A share its rows; different A are
stacked, and B is block-diagonal then. Rows of parts that are not adapted are 0 in B.
"""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from veratune.adapter import Adapter
from veratune.errors import BaseModelError, UnsupportedError, near
from veratune.layers.kinds import is_attention, is_conv1d
from veratune.ops.matrix import dense
from veratune.patterns import PART
from veratune.targets import base_module, layers_of, parts_of

_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class LoraPair:
    """The LoRA of one layer: ΔW = B A.

    Attributes:
        A: Down-projection, shape (r, n), float32. A convolution's n is in / groups * kernel.
        B: Up-projection, shape (m, r), float32, with every scale in it.
        kernel: Sizes of a convolution's kernel; empty for a linear layer.
    """

    A: Tensor
    B: Tensor
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """R."""
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """ΔW = B A, shape (m, n), float32."""
        return self.B @ self.A


def lora_pairs(adapter: Adapter, model: nn.Module | None = None) -> dict[str, LoraPair]:
    """Write an adapter as LoRA: lora_A = A, lora_B = s diag(b) B diag(d).

    Args:
        adapter: The adapter.
        model: The base model; the meta device will do. It is needed for parts of fused layers and
            for convolutions, whose place in the whole weight the adapter does not record.

    Returns:
        The pair of each layer of the model, by the layer's path; experts of a fused weight have a
        pair each, by "path.weight:expert".

    Raises:
        UnsupportedError: A layer whose ΔW is not one LoRA pair, or a missing model.
        BaseModelError: The model lacks a layer.
    """
    out = {}
    by_module: dict[str, list[str]] = {}
    for layer in adapter.shapes:
        path, _, part = layer.partition(PART)
        if part.isdecimal():
            out[layer] = LoraPair(*_matrices(adapter, layer)[1:])
        else:
            by_module.setdefault(path, []).append(layer)
    layers = None if model is None else dict(layers_of(model))
    for path, names in by_module.items():
        fused, kernel = names != [path], adapter.kernels.get(path, ())
        if (fused or kernel) and model is None:
            what = "parts of a fused layer" if fused else "a convolution"
            raise UnsupportedError(
                f"layer '{names[0]}' is {what}; its LoRA needs the base model's configuration: "
                "give --model"
            )
        if layers is not None and path not in layers:
            raise BaseModelError(
                f"the adapter has layer '{path}', {type(model).__name__} has "
                f"not{near(path, layers)}"
            )
        if kernel:
            assert model is not None
            check_convolution(base_module(model, path), path, adapter)
        if fused:
            assert model is not None
            out[path] = _fused_pair(adapter, model, path, names)
        else:
            _, A, B = _matrices(adapter, path)
            out[path] = LoraPair(A, B, kernel)
    return out


def check_convolution(module: nn.Module, path: str, adapter: Adapter) -> None:
    """Raise UnsupportedError for a convolution whose ΔW is not a k x k down and a 1 x 1 up."""
    assert isinstance(module, nn.modules.conv._ConvNd)
    reason = ""
    if adapter.config.conv_layout == "loralib":
        reason = "it was trained with conv_layout='loralib'"
    elif module.transposed:
        reason = "it is a transposed convolution"
    elif module.groups > 1:
        reason = f"it has {module.groups} groups"
    elif any(step != 1 for step in module.dilation):
        reason = f"it has dilation {tuple(module.dilation)}"
    elif module.padding_mode != "zeros":
        reason = f"it pads with {module.padding_mode!r}"
    if reason:
        raise UnsupportedError(
            f"layer '{path}' cannot be written as LoRA: {reason}; merge the adapter instead"
        )


def stored_transposed(model: nn.Module | None) -> bool:
    """Whether a model's linear layers are transformers' Conv1D (PEFT: fan_in_fan_out)."""
    return model is not None and any(is_conv1d(module) for _, module in layers_of(model))


def vectors_of_layer(adapter: Adapter, layer: str) -> tuple[Tensor, Tensor]:
    """(d, b) of a layer in float32; a vector that is not trained is ones."""
    rank, (m, _) = adapter.ranks[layer], adapter.shapes[layer]
    d = adapter.d[layer].float() if layer in adapter.d else torch.ones(rank)
    b = adapter.b[layer].float() if layer in adapter.b else torch.ones(m)
    return d, b


def _matrices(adapter: Adapter, layer: str) -> tuple[tuple[str, int, int], Tensor, Tensor]:
    """Return a key of the layer's A, then its lora_A and lora_B."""
    (m, n), rank = adapter.shapes[layer], adapter.ranks[layer]
    basis = adapter.basis
    A, B = (dense(matrix) for matrix in basis.pair(layer, m, n, rank, _CPU, torch.float32))
    d, b = vectors_of_layer(adapter, layer)
    key = (basis.roles(layer, m, n)[0], rank, n)
    return key, A.clone(), b[:, None] * B * (d * basis.scale(rank, n))


def _fused_pair(adapter: Adapter, model: nn.Module, path: str, names: list[str]) -> LoraPair:
    """The one LoRA of a fused layer's adapted parts."""
    module = base_module(model, path)
    if is_attention(module):
        raise UnsupportedError(
            f"layer '{path}' is nn.MultiheadAttention, which LoRA programs do not adapt in parts; "
            "merge the adapter instead"
        )
    parts = {part.name: part for part in parts_of(model, path, module, adapter.config)}
    rows = max(part.stop for part in parts.values())
    stacked: dict[tuple[str, int, int], Tensor] = {}
    blocks: list[tuple[tuple[str, int, int], int, Tensor]] = []
    for name in names:
        part = parts.get(name.partition(PART)[2])
        if part is None or (part.out_features, part.in_features) != adapter.shapes[name]:
            raise BaseModelError(
                f"the adapter has layer '{name}' of shape {adapter.shapes[name]}; "
                f"{type(model).__name__} has {', '.join(parts)} in '{path}'"
            )
        key, A, B = _matrices(adapter, name)
        stacked[key] = A
        blocks.append((key, part.start, B))
    starts, at = {}, 0
    for key, A in stacked.items():
        starts[key], at = at, at + A.shape[0]
    whole = torch.zeros(rows, at)
    for key, row, B in blocks:
        whole[row : row + B.shape[0], starts[key] : starts[key] + B.shape[1]] = B
    return LoraPair(torch.cat(list(stacked.values())), whole)


def most_common(ranks: Iterable[int]) -> int:
    """The rank that most layers have; the higher of two that are equally common."""
    found = list(ranks)
    return max(set(found), key=lambda rank: (found.count(rank), rank))
