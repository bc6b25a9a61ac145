"""VeraConv: convolutions and transposed convolutions, of one to three dimensions, with any stride, padding, dilation and groups.

A convolution is the matrix W (out, in / groups * kernel) for each place of its output; with the layout "loralib" it is the
matrix that loralib's LoRA for convolutions factors, (out / groups * k, in * k) for a square kernel of side k, whose A and B have
rank * k rows and columns.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veratune.config import VeraConfig
from veratune.errors import UnsupportedError
from veratune.layers.base import (
    Part,
    VeraVectors,
    VeraWeightLayer,
    by_adapter,
    is_plain,
    product_dtype,
)
from veratune.ops.functional import is_full_precision, plan_of, vera_conv
from veratune.ops.matrix import dense

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


def is_conv(module: nn.Module) -> bool:
    """Conv1d to Conv3d and their transposed forms (Hugging Face's Conv1D is a linear layer)."""
    return isinstance(module, nn.modules.conv._ConvNd)


def conv_part(module: Any, layout: str) -> Part:
    """The matrix of a convolution. Raises UnsupportedError for one that has none in the layout "loralib"."""
    kernel = tuple(module.kernel_size)
    if layout == "matrix":
        columns = module.in_channels // module.groups * math.prod(kernel)
        return Part("", "weight", 0, module.out_channels, columns, kernel)
    if module.transposed or len(kernel) != 2 or kernel[0] != kernel[1]:
        raise UnsupportedError(
            f"conv_layout='loralib' is made for Conv2d with square kernels, not for a {type(module).__name__} with a kernel of "
            f"{' x '.join(map(str, kernel))}; use conv_layout='matrix' or exclude it"
        )
    side = kernel[0]
    return Part(
        "",
        "weight",
        0,
        module.out_channels // module.groups * side,
        module.in_channels * side,
        kernel,
    )


def check_conv(module: nn.Module, path: str, config: VeraConfig) -> None:
    """Raise UnsupportedError where a convolution with a forward of its own cannot be adapted as the config says.

    Such a layer (padding to size, a standardized weight) is called with W + ΔW for its weight, and with nothing beside it.
    """
    if not _own_forward(module):
        return
    what = f"layer '{path}' is a {type(module).__name__}, a convolution with a forward of its own, which is called with W + ΔW"
    if config.plan not in ("auto", "merged"):
        raise UnsupportedError(
            f"{what}; plan={config.plan!r} computes beside it: use plan='auto' or exclude the layer"
        )
    if config.dropout:
        raise UnsupportedError(
            f"{what}; dropout={config.dropout} needs an input of the adapter alone: set it to 0 or exclude the layer"
        )


def _own_forward(module: nn.Module) -> bool:
    return type(module).forward not in _FORWARDS


class VeraConv(VeraWeightLayer):
    """y = conv(x, W + ΔW), or conv(x, W) and the adapter's share beside it; called as the base layer is."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.rows is None:
            return self._with(self.current)(x, *args, **kwargs)
        return by_adapter(self, (x, *args), kwargs, self._with)

    def to_weight_layout(self, delta: Tensor, weight: Tensor) -> Tensor:
        base: Any = self.base
        if not base.transposed:
            return delta.view(weight.shape)
        groups = base.groups
        grid = delta.view(
            groups, base.out_channels // groups, base.in_channels // groups, *base.kernel_size
        )
        return grid.transpose(1, 2).reshape(weight.shape)

    def _with(self, adapter: str | None) -> Any:
        """The base layer as a function, with an adapter."""
        if adapter is None or adapter not in self.vera:
            return self.base
        (vectors,) = self.vectors(adapter)
        base: Any = self.base

        def call_with_weight(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not is_full_precision(base.weight.dtype):
                raise UnsupportedError(
                    f"layer '{self.name}' has a forward of its own and a weight of {base.weight.dtype}, too coarse to take ΔW in; load "
                    "the base model in float32 or exclude the layer"
                )
            weights = self.cached_weights(adapter) or self.merged_weights(adapter)
            return torch.func.functional_call(base, weights, (x, *args), kwargs)

        def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            weight = base.weight
            whole = (
                is_plain(base)
                and weight.dtype == x.dtype == product_dtype(x)
                and is_full_precision(weight.dtype)
            )
            kept = self.cached_weights(adapter) if whole else None
            if kept is not None:
                return self._convolve(x, kept["weight"], base.bias, *args, **kwargs)
            plan = self._plan(x, vectors, whole and not (vectors.config.dropout and self.training))
            if plan == "merged":
                return self._convolve(
                    x, self.merged_weights(adapter)["weight"], base.bias, *args, **kwargs
                )
            y = base(x, *args, **kwargs)
            dropped = vectors.apply_dropout(x).to(product_dtype(x))
            if plan == "dense":
                return y + self._convolve(
                    dropped, self.deltas(adapter)["weight"].to(dropped.dtype), None, *args, **kwargs
                )
            return y + self._factored(dropped, vectors, *args, **kwargs)

        return call_with_weight if _own_forward(base) else call

    def _plan(self, x: Tensor, vectors: VeraVectors, in_weight: bool) -> str:
        """Which of a convolution's plans is taken: factored, merged or dense. in_weight: whether W may take ΔW in."""
        base: Any = self.base
        forced, loralib = vectors.config.plan, vectors.config.conv_layout == "loralib"
        if forced == "merged" and not in_weight:
            raise UnsupportedError(
                f"plan='merged' puts ΔW into the weight of layer '{self.name}', but it is {base.weight.dtype} for a product in "
                f"{product_dtype(x)}, hooked, or has dropout before its adapter; use plan='auto', 'factored' or 'dense'"
            )
        if forced == "factored" and loralib:
            raise UnsupportedError(
                f"plan='factored', but the factors of layer '{self.name}' in conv_layout='loralib' are no convolutions of its "
                "input; use plan='auto', 'merged' or 'dense'"
            )
        if forced != "auto":
            return forced
        beside = "merged" if in_weight else "dense"
        if loralib:
            return beside
        places = x.numel() // base.in_channels // (1 if base.transposed else math.prod(base.stride))
        pair = vectors.pair(x.device, product_dtype(x))
        chosen = plan_of(
            x,
            *pair,
            (vectors.d, vectors.b),
            "auto",
            in_weight=in_weight,
            own_weight=False,
            T=max(1, places),
        )
        return "factored" if chosen.plan == "factored" else beside

    def _convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None
    ) -> Tensor:
        """The base layer's convolution with another weight and bias, without the hooks of a call."""
        base: Any = self.base
        if not base.transposed:
            return base._conv_forward(x, weight, bias)
        kernel = base.kernel_size
        over = base._output_padding(
            x, output_size, base.stride, base.padding, kernel, len(kernel), base.dilation
        )
        return _TRANSPOSED[len(kernel) - 1](
            x, weight, bias, base.stride, base.padding, over, base.groups, base.dilation
        )

    def _factored(self, x: Tensor, vectors: VeraVectors, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.base
        A, B = (dense(matrix) for matrix in vectors.pair(x.device, x.dtype))
        return vera_conv(
            x, A, B, vectors.d, vectors.b, vectors.scale, groups=base.groups, kernel=base.kernel_size, transposed=base.transposed,
            convolve=lambda x, weight: self._convolve(x, weight, None, *args, **kwargs),
        )  # fmt: skip
