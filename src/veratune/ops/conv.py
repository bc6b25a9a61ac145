"""VeRA on a convolution: A as a convolution of the input, B as a convolution of kernel size 1."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from veratune.errors import ShapeError
from veratune.ops.checks import check_adapter
from veratune.ops.delta import scaled_vector

_CONV = (F.conv1d, F.conv2d, F.conv3d)


def vera_conv(
    x: Float[Tensor, "N c *places"],
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "m r"],
    d: Float[Tensor, " r"] | None,
    b: Float[Tensor, " m"] | None,
    scale: float = 1.0,
    *,
    convolve: Callable[[Tensor, Tensor], Tensor],
    kernel: tuple[int, ...],
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    """Apply a convolution's VeRA update: y = scale * b * (B (d * (A patch))) at each output place.

    Each group of outputs has its own rows of B and its own part of x; all groups share A.

    Args:
        x: Input, shape (N, in_channels, *places).
        A: Frozen down-projection, shape (r, in_channels / groups * kernel size).
        B: Frozen up-projection, shape (out_channels, r).
        d: Trained rank scale, shape (r,); None for ones.
        b: Trained output scale, shape (out_channels,); None for ones.
        scale: Factor s of the basis.
        convolve: Called with x and a weight: the layer's own convolution, without bias.
        kernel: Kernel size in each dimension.
        groups: Groups of the convolution.
        transposed: Whether the convolution is a transposed one.

    Returns:
        The update, shape (N, out_channels, *output places). Gradients flow to x, d and b.

    Raises:
        ShapeError: names the argument, what was found and what was wanted.

    Source: VeRA (arXiv 2310.11454), equation 2, with the convolution as the matrix
    (out_channels, in_channels / groups * kernel size).

    >>> A, B = torch.ones(4, 3 * 9), torch.ones(6, 4)
    >>> d, b, x = torch.ones(4), torch.ones(6), torch.ones(2, 3, 5, 5)
    >>> vera_conv(x, A, B, d, b, convolve=torch.nn.functional.conv2d, kernel=(3, 3)).shape
    torch.Size([2, 6, 3, 3])
    """
    check_adapter(A, B, d, b)
    if A.shape[1] % math.prod(kernel):
        raise ShapeError(
            f"A {tuple(A.shape)} does not fit; A is (r, in / groups * {math.prod(kernel)}) "
            f"for the kernel {kernel}"
        )
    scaled = A * scale if d is None else A * scaled_vector(d, scale, A.dtype)[:, None]
    down = scaled.view(A.shape[0], -1, *kernel)
    if transposed:
        down = down.transpose(0, 1)
    z = convolve(x, torch.cat([down] * groups))
    up = B if b is None else B * b.to(B.dtype)[:, None]
    return _CONV[len(kernel) - 1](z, up.view(*B.shape, *(1 for _ in kernel)), groups=groups)
