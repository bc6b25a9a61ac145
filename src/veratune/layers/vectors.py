"""VeraVectors: the trained vectors d and b of one adapter for one weight matrix."""

import dataclasses

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from veratune.basis.basis import Basis
from veratune.config import VeraConfig
from veratune.ops.delta import delta_weight
from veratune.ops.linear import vera_linear
from veratune.ops.matrix import Matrix


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows start..stop of one weight matrix, which have their own d and b.

    Args:
        name: "" for a whole layer, the part of a fused one ("q"), or an expert ("3").
        parameter: Name of the weight in the base layer.
        start: First output feature.
        stop: One past the last output feature.
        in_features: n.
        kernel: Kernel size of a convolution; empty for other layers.
        expert: Index into the fused weight of a mixture of experts; None for other layers.
    """

    name: str
    parameter: str
    start: int
    stop: int
    in_features: int
    kernel: tuple[int, ...] = ()
    expert: int | None = None

    @property
    def out_features(self) -> int:
        """m."""
        return self.stop - self.start

    @property
    def key(self) -> str:
        """The part's name as a module's name, which may not be empty."""
        if self.expert is not None:
            return f"{self.parameter.replace('.', '/')}:{self.name}"
        return self.name or "whole"


class VeraVectors(nn.Module):
    """The vectors d and b of one adapter for one part of a layer, and the basis that they scale.

    Where the config trains one vector only, the other is None and stands for ones.

    Args:
        layer: Full name, such as "h.0.attn.c_attn:q".
        part: Rows of the weight matrix.
        rank: r.
        basis: Source of A and B.
        config: Config of the adapter.
        device: Device of the vectors.
    """

    d: nn.Parameter | None
    b: nn.Parameter | None

    def __init__(
        self,
        layer: str,
        part: Part,
        rank: int,
        basis: Basis,
        config: VeraConfig,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.layer, self.part, self.rank, self.basis, self.config = layer, part, rank, basis, config
        d = None if config.vectors == "b" else _filled(rank, config.start_d, config, device)
        b = (
            None
            if config.vectors == "d"
            else _filled(part.out_features, config.start_b, config, device)
        )
        self.register_parameter("d", d)
        self.register_parameter("b", b)

    @property
    def scale(self) -> float:
        """Factor s of the basis at this layer's size."""
        return self.basis.scale(self.rank, self.part.in_features)

    def pair(self, device: torch.device, dtype: torch.dtype) -> tuple[Matrix, Matrix]:
        """(A, B) at this layer's size, shapes (r, n) and (m, r)."""
        part = self.part
        return self.basis.pair(
            self.layer, part.out_features, part.in_features, self.rank, device, dtype
        )

    def apply_dropout(self, x: Tensor) -> Tensor:
        """x after this adapter's dropout."""
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x

    def forward(
        self,
        x: Float[Tensor, "*T n"],
        weight: Float[Tensor, "m n"] | None = None,
        bias: Float[Tensor, " m"] | None = None,
    ) -> Float[Tensor, "*T m"]:
        """Compute scale * b * (B (d * (A x))), plus W x + bias where a weight is given."""
        A, B = self.pair(x.device, product_dtype(x))
        return vera_linear(
            self.apply_dropout(x),
            A,
            B,
            self.d,
            self.b,
            self.scale,
            weight=weight,
            bias=bias,
            plan=self.config.plan,
            layer_id=id(self),
        )

    def delta_weight(self, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "m n"]:
        """Compute ΔW of this part."""
        return delta_weight(*self.pair(device, dtype), self.d, self.b, self.scale)


def _filled(size: int, value: float, config: VeraConfig, device: torch.device) -> nn.Parameter:
    """A new vector; an ordinary tensor even in inference mode, so that it can be trained later."""
    with torch.inference_mode(False):
        dtype = getattr(torch, config.dtype)
        return nn.Parameter(torch.full((size,), value, dtype=dtype, device=device))


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product with x runs in: autocast's where it is on, else x's own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
