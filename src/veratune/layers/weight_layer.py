"""VeraWeightLayer: a layer with weight matrices W, each adapted by vectors d and b."""

from typing import Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from veratune.errors import UnsupportedError
from veratune.layers.merging import MergeReport, merge_weight
from veratune.layers.quantized import is_dense
from veratune.layers.vectors import VeraVectors
from veratune.layers.weight_cache import WEIGHTS
from veratune.layers.wrapper import VeraLayer
from veratune.ops.delta import is_full_precision


class VeraWeightLayer(VeraLayer):
    """A VeraLayer over weight matrices: linear layers, convolutions and attention blocks."""

    def __init__(self, base: nn.Module, name: str) -> None:
        super().__init__(base, name)
        self.weights_before_merge: dict[str, Tensor] = {}

    def add(self, adapter: str, vectors: VeraVectors) -> None:
        """Add an adapter's vectors for one part; parts come in rising order and do not overlap."""
        if adapter not in self.vera:
            self.vera[adapter] = nn.ModuleDict()
        self._parts(adapter)[vectors.part.key] = vectors.train(self.training)

    def vectors(self, adapter: str) -> list[VeraVectors]:
        """The adapter's vectors in this layer, in rising order; empty if it has none here."""
        if adapter not in self.vera:
            return []
        return cast(list[VeraVectors], list(self._parts(adapter).values()))

    def _parts(self, adapter: str) -> nn.ModuleDict:
        return cast(nn.ModuleDict, self.vera[adapter])

    def to_weight_layout(self, delta: Float[Tensor, "m n"], weight: Tensor) -> Float[Tensor, "..."]:
        """ΔW (m, n) of the whole layer in the layout of the stored weight."""
        return delta

    def rows_of(self, weight: Tensor) -> int:
        """m of the whole matrix, of which a part may be some rows."""
        return weight.shape[0]

    def weight_of(self, parameter: str) -> nn.Parameter:
        """A weight of the base layer, as stored."""
        return self.base.get_parameter(parameter)

    def deltas(self, adapter: str) -> dict[str, Tensor]:
        """ΔW for each weight that the adapter changes, in the weight's layout.

        In float32, or in float64 where the weight is.
        """
        out: dict[str, Tensor] = {}
        for vectors in self.vectors(adapter):
            part, weight = vectors.part, self.weight_of(vectors.part.parameter)
            delta = vectors.delta_weight(weight.device, _wide(weight))
            if part.name:
                delta = F.pad(delta, (0, 0, part.start, self.rows_of(weight) - part.stop))
            delta = self.to_weight_layout(delta, weight)
            others = out.get(part.parameter)
            out[part.parameter] = delta if others is None else others + delta
        return out

    def merged_weights(self, adapter: str) -> dict[str, Tensor]:
        """W + ΔW for each weight that the adapter changes, in the weight's layout.

        In float32, or in float64 where the weight is.
        """
        return {
            parameter: self.weight_of(parameter).to(delta.dtype) + delta
            for parameter, delta in self.deltas(adapter).items()
        }

    def cache_inputs(self, adapter: str) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The adapter's vectors, and the weights that it changes by parameter."""
        parts = self.vectors(adapter)
        vectors: list[Tensor] = [p for part in parts for p in part.parameters()]
        return vectors, {v.part.parameter: self.weight_of(v.part.parameter) for v in parts}

    def cached_weights(self, adapter: str) -> dict[str, Tensor] | None:
        """`merged_weights` from the weight cache; None where the cache may not be used.

        That is in training, for mixed batches, where gradients of the vectors are wanted, with a
        `plan` set, in compiled or traced code, and for weights that are not dense float32 or
        float64.
        """
        if self.training or self.rows is not None:
            return None
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return None
        for vectors in self.vectors(adapter):
            weight = self.weight_of(vectors.part.parameter)
            if (
                vectors.config.plan != "auto"
                or not is_dense(weight)
                or not is_full_precision(weight.dtype)
                or weight.is_inference()
            ):
                return None
            if torch.is_grad_enabled() and (
                weight.requires_grad or any(p.requires_grad for p in vectors.parameters())
            ):
                return None
        return WEIGHTS.get(self, adapter)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; training frees the layer's cached weights."""
        if mode:
            WEIGHTS.discard(self)
        return super().train(mode)

    def check_mergeable(self, adapter: str) -> None:
        """Raise UnsupportedError, with the reason, where W + ΔW cannot be stored."""
        for vectors in self.vectors(adapter):
            weight = self.weight_of(vectors.part.parameter)
            if not is_dense(weight):
                raise UnsupportedError(
                    f"layer '{self.name}' stores its weight as {type(weight).__name__} of "
                    f"{weight.dtype}; W + ΔW would have to be quantized again and lose ΔW. "
                    "Load the base model in 16 or 32 bits to merge"
                )

    @torch.no_grad()
    def merge(self, adapter: str) -> list[MergeReport]:
        """W <- W + ΔW. W is kept, so that `unmerge` restores its bits.

        Returns:
            The rounding error of each weight.
        """
        WEIGHTS.discard(self)
        report = []
        for parameter, delta in self.deltas(adapter).items():
            weight = self.weight_of(parameter).data
            self.weights_before_merge[parameter] = weight.clone()
            report.append(merge_weight(weight, delta, f"{self.name}.{parameter}"))
        self.merged = adapter
        return report

    @torch.no_grad()
    def unmerge(self, restore: bool = True) -> None:
        """Restore W bit for bit, or, without `restore`, forget it and stay merged."""
        for parameter, before in self.weights_before_merge.items():
            if restore:
                self.weight_of(parameter).data.copy_(before)
        self.weights_before_merge = {}
        self.merged = None


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def is_plain(base: nn.Module) -> bool:
    """Whether nothing hooks into a layer's forward, so that its weight may be read directly."""
    return "forward" not in base.__dict__ and not any(
        (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks)
    )
