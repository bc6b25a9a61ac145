"""Linear layers on few rows of activations: y = x Wᵀ + bias, with the product taken as W xᵀ."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def takes_rows_as_columns(rows: int, out_features: int, in_features: int) -> bool:
    """Return whether float32 products on a CPU take less time as W xᵀ, with W of shape (m, n).

    BLAS streams W at full speed as the left factor; as the right one, with 2 to 8 rows of x, it
    first copies W. Measured with MKL 2024 on an AMD EPYC, shapes 192 to 49,152 by 576 to 1,536.

    Args:
        rows: Rows of x.
        out_features: m.
        in_features: n.
    """
    if rows < 2 or out_features < in_features:
        return False
    wide = out_features // in_features
    return rows <= (32 if wide >= 8 else 8 if wide >= 2 else 4)


def linear(
    x: Float[Tensor, "*T n"], weight: Float[Tensor, "m n"], bias: Float[Tensor, " m"] | None = None
) -> Float[Tensor, "*T m"]:
    """Compute y = x Wᵀ + bias, in the faster order of the product on a CPU.

    Args:
        x: Activations, shape (*T, n).
        weight: W, shape (m, n).
        bias: Shape (m,), or None.

    Returns:
        Shape (*T, m), contiguous. Equal to torch's F.linear but for rounding.

    >>> linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)).shape
    torch.Size([2, 4])
    """
    m, n = weight.shape
    if (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and takes_rows_as_columns(x.numel() // n, m, n)
        and not torch.is_autocast_enabled("cpu")
    ):
        y = torch.mm(weight, x.reshape(-1, n).t()).t().contiguous()
        return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], m)
    return F.linear(x, weight, bias)
