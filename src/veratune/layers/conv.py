"""VeraConv: convolutions and transposed convolutions in one to three dimensions.

Any stride, padding, dilation and groups. A convolution is the matrix
W (out_channels, in_channels / groups * kernel size), applied at each place of its output. With
conv_layout="loralib" it is the matrix that loralib factors,
(out_channels / groups * k, in_channels * k) for a square kernel of side k, at rank * k.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from veratune.config import VeraConfig
from veratune.errors import UnsupportedError
from veratune.layers.rows import run_by_adapter
from veratune.layers.vectors import Part, VeraVectors, product_dtype
from veratune.layers.weight_layer import VeraWeightLayer, is_plain
from veratune.ops.conv import vera_conv
from veratune.ops.delta import is_full_precision
from veratune.ops.linear import plan_of
from veratune.ops.matrix import dense

ConvModule = nn.modules.conv._ConvNd

_KINDS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_FORWARDS = tuple(kind.forward for kind in _KINDS)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def conv_part(module: ConvModule, layout: str) -> Part:
    """Describe a convolution as a matrix.

    Args:
        module: The convolution.
        layout: `VeraConfig.conv_layout`.

    Returns:
        The part: the whole matrix and the kernel.

    Raises:
        UnsupportedError: layout "loralib" for a convolution that is no Conv2d with a square kernel.
    """
    kernel = tuple(module.kernel_size)
    if layout == "matrix":
        columns = module.in_channels // module.groups * math.prod(kernel)
        return Part("", "weight", 0, module.out_channels, columns, kernel)
    if module.transposed or len(kernel) != 2 or kernel[0] != kernel[1]:
        raise UnsupportedError(
            "conv_layout='loralib' is made for Conv2d with square kernels, not for a "
            f"{type(module).__name__} with a kernel of {' x '.join(map(str, kernel))}; "
            "use conv_layout='matrix' or exclude it"
        )
    side = kernel[0]
    rows, columns = module.out_channels // module.groups * side, module.in_channels * side
    return Part("", "weight", 0, rows, columns, kernel)


def check_conv(module: nn.Module, path: str, config: VeraConfig) -> None:
    """Raise UnsupportedError if the config does not fit a convolution with its own forward.

    Such a layer (padding to size, a standardized weight) can only be called with W + ΔW as its
    weight.
    """
    if not _has_custom_forward(module):
        return
    what = (
        f"layer '{path}' is a {type(module).__name__}, a convolution with a forward of its own, "
        "which is called with W + ΔW"
    )
    if config.plan not in ("auto", "merged"):
        raise UnsupportedError(
            f"{what}; plan={config.plan!r} computes beside it: use plan='auto' or exclude the layer"
        )
    if config.dropout:
        raise UnsupportedError(
            f"{what}; dropout={config.dropout} needs an input of the adapter alone: "
            "set it to 0 or exclude the layer"
        )


def _has_custom_forward(module: nn.Module) -> bool:
    return type(module).forward not in _FORWARDS


class VeraConv(VeraWeightLayer):
    """y = conv(x, W + ΔW), or conv(x, W) plus the update; called as the base layer is."""

    def forward(
        self, x: Float[Tensor, "..."], output_size: list[int] | None = None
    ) -> Float[Tensor, "..."]:
        """Compute the adapted convolution; output_size is for transposed ones."""
        self.check_recomputation()
        kwargs = {} if output_size is None else {"output_size": output_size}
        if self.rows is None:
            return self._with_adapter(self.current)(x, **kwargs)
        return cast(Tensor, run_by_adapter(self, (x,), kwargs, self._with_adapter))

    @property
    def _conv(self) -> ConvModule:
        return cast(ConvModule, self.base)

    def to_weight_layout(self, delta: Float[Tensor, "m n"], weight: Tensor) -> Tensor:
        conv = self._conv
        if not conv.transposed:
            return delta.view(weight.shape)
        groups = conv.groups
        per_group = (groups, conv.out_channels // groups, conv.in_channels // groups)
        grid = delta.view(*per_group, *conv.kernel_size)
        return grid.transpose(1, 2).reshape(weight.shape)

    def _with_adapter(self, adapter: str | None) -> Callable[..., Tensor]:
        """The base layer as a function, with an adapter; None: without one."""
        if adapter is None or adapter not in self.vera:
            return self.base
        call = self._call_custom if _has_custom_forward(self.base) else self._call_plain
        return lambda x, **kwargs: call(adapter, x, **kwargs)

    def _call_custom(self, adapter: str, x: Tensor, **kwargs: list[int]) -> Tensor:
        """A convolution with its own forward, called with W + ΔW."""
        dtype = self.weight_of("weight").dtype
        if not is_full_precision(dtype):
            raise UnsupportedError(
                f"layer '{self.name}' has a forward of its own and a weight of {dtype}, "
                "too coarse to take ΔW in; load the base model in float32 or exclude the layer"
            )
        weights = self.cached_weights(adapter) or self.merged_weights(adapter)
        return cast(Tensor, torch.func.functional_call(self.base, weights, (x,), kwargs))

    def _call_plain(self, adapter: str, x: Tensor, **kwargs: list[int]) -> Tensor:
        """A plain convolution, in the cheapest order."""
        (vectors,) = self.vectors(adapter)
        conv, weight = self._conv, self.weight_of("weight")
        in_weight = (
            is_plain(conv)
            and weight.dtype == x.dtype == product_dtype(x)
            and is_full_precision(weight.dtype)
        )
        merged = self.cached_weights(adapter) if in_weight else None
        if merged is not None:
            return self._convolve(x, merged["weight"], conv.bias, **kwargs)
        dropped_out = bool(vectors.config.dropout and self.training)
        plan = self._plan(x, vectors, in_weight and not dropped_out)
        if plan == "merged":
            weight_with_delta = self.merged_weights(adapter)["weight"]
            return self._convolve(x, weight_with_delta, conv.bias, **kwargs)
        y = cast(Tensor, conv(x, **kwargs))
        dropped = vectors.apply_dropout(x).to(product_dtype(x))
        if plan == "dense":
            delta = self.deltas(adapter)["weight"].to(dropped.dtype)
            return y + self._convolve(dropped, delta, None, **kwargs)
        return y + self._factored(dropped, vectors, **kwargs)

    def _plan(self, x: Tensor, vectors: VeraVectors, in_weight: bool) -> str:
        """Choose a convolution's plan: factored, merged or dense.

        in_weight: whether ΔW may be added to W.
        """
        conv = self._conv
        forced, loralib = vectors.config.plan, vectors.config.conv_layout == "loralib"
        if forced == "merged" and not in_weight:
            raise UnsupportedError(
                f"plan='merged' puts ΔW into the weight of layer '{self.name}', but it is "
                f"{conv.weight.dtype} for a product in {product_dtype(x)}, hooked, or has dropout "
                "before its adapter; use plan='auto', 'factored' or 'dense'"
            )
        if forced == "factored" and loralib:
            raise UnsupportedError(
                f"plan='factored', but the factors of layer '{self.name}' in conv_layout='loralib' "
                "are no convolutions of its input; use plan='auto', 'merged' or 'dense'"
            )
        if forced != "auto":
            return forced
        in_one = "merged" if in_weight else "dense"
        if loralib:
            return in_one
        positions = x.numel() // conv.in_channels
        places = positions // (1 if conv.transposed else math.prod(conv.stride))
        A, B = vectors.pair(x.device, product_dtype(x))
        choice = plan_of(
            x,
            A,
            B,
            (vectors.d, vectors.b),
            "auto",
            in_weight=in_weight,
            own_weight=False,
            T=max(1, places),
        )
        return "factored" if choice.plan == "factored" else in_one

    def _convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None
    ) -> Tensor:
        """The base layer's convolution with another weight and bias, without its hooks."""
        conv: Any = self.base
        if not conv.transposed:
            return cast(Tensor, conv._conv_forward(x, weight, bias))
        kernel = conv.kernel_size
        padding = conv._output_padding(
            x, output_size, conv.stride, conv.padding, kernel, len(kernel), conv.dilation
        )
        return _TRANSPOSED[len(kernel) - 1](
            x, weight, bias, conv.stride, conv.padding, padding, conv.groups, conv.dilation
        )

    def _factored(self, x: Tensor, vectors: VeraVectors, **kwargs: list[int]) -> Tensor:
        """The update as two convolutions."""
        conv = self._conv
        A, B = (dense(matrix) for matrix in vectors.pair(x.device, x.dtype))
        return vera_conv(
            x,
            A,
            B,
            vectors.d,
            vectors.b,
            vectors.scale,
            convolve=lambda x, weight: self._convolve(x, weight, None, **kwargs),
            kernel=conv.kernel_size,
            groups=conv.groups,
            transposed=conv.transposed,
        )
