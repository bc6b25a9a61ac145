"""The mathematics of VeRA on tensors, and nothing else.

Throughout: T is any number of leading dimensions, n = in_features, m = out_features, r = rank. A (r, n)
and B (m, r) are frozen; d (r,) and b (m,) are trained, and None stands for a vector of ones. `scale` is
the basis' factor s. Products run in the dtype of x (of autocast, where it is on).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from veratune.errors import ShapeError


def delta_weight(A: Tensor, B: Tensor, d: Tensor | None, b: Tensor | None, scale: float = 1.0) -> Tensor:
    """ΔW = scale * diag(b) B diag(d) A

    Returns (m, n) in A's dtype; its rank is at most r. Gradients flow to d and b.
    Raises ShapeError naming the argument, what was found and what was wanted.
    Source: VeRA, arXiv 2310.11454, equation 2.

    >>> A, B = torch.ones(4, 8), torch.ones(6, 4)
    >>> delta_weight(A, B, torch.ones(4), torch.ones(6)).shape
    torch.Size([6, 8])
    """
    _check(A, B, d, b)
    inner = A if d is None else d.to(A.dtype)[:, None] * A
    product = (B.to(A.dtype) @ inner) * scale
    return product if b is None else b.to(A.dtype)[:, None] * product


def vera_linear(x: Tensor, A: Tensor, B: Tensor, d: Tensor | None, b: Tensor | None, scale: float = 1.0) -> Tensor:
    """y = scale * b * (B (d * (A x)))

    x: (*T, n) activations. Returns (*T, m). Gradients flow to x, d and b only.
    Raises ShapeError naming the argument, what was found and what was wanted.
    Source: VeRA, arXiv 2310.11454, equation 2.

    >>> A, B = torch.ones(4, 8), torch.ones(6, 4)
    >>> vera_linear(torch.ones(2, 3, 8), A, B, torch.ones(4), torch.ones(6)).shape
    torch.Size([2, 3, 6])
    """
    _check(A, B, d, b)
    _check_x(x, A)
    z = F.linear(x, A)
    z = z * scale if d is None else z * _scaled(d, scale, z.dtype)
    y = F.linear(z, B)
    return y if b is None else y * b.to(y.dtype)


def vera_rows(x: Tensor, A: Tensor, B: Tensor, d: Tensor | None, b: Tensor | None, index: Tensor, scale: float = 1.0) -> Tensor:
    """y[i] = scale * b[index[i]] * (B (d[index[i]] * (A x[i])))

    x: (N, *T, n), a batch of N rows; d: (k, r) and b: (k, m), the vectors of k adapters on one basis;
    index: (N,) integers in [0, k). Returns (N, *T, m). Gradients flow to x, d and b.
    Raises ShapeError naming the argument, what was found and what was wanted.

    >>> A, B = torch.ones(4, 8), torch.ones(6, 4)
    >>> vera_rows(torch.ones(2, 8), A, B, torch.ones(3, 4), torch.ones(3, 6), torch.tensor([2, 0])).shape
    torch.Size([2, 6])
    """
    _check(A, B, None if d is None else d[0], None if b is None else b[0])
    _check_x(x, A)
    if index.shape != x.shape[:1]:
        raise ShapeError(f"index has shape {tuple(index.shape)}; x has {x.shape[0]} rows, so ({x.shape[0]},) is wanted")
    middle = (1,) * (x.dim() - 2)

    def spread(vectors: Tensor) -> Tensor:
        return vectors[index].view(len(index), *middle, vectors.shape[1])

    z = F.linear(x, A)
    z = z * scale if d is None else z * spread(_scaled(d, scale, z.dtype))
    y = F.linear(z, B)
    return y if b is None else y * spread(b.to(y.dtype))


def _scaled(d: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * d in `dtype`: the scale goes to the small vector, at the higher precision of the two, rounded once."""
    return (d.to(torch.promote_types(d.dtype, dtype)) * scale).to(dtype)


def _check(A: Tensor, B: Tensor, d: Tensor | None, b: Tensor | None) -> None:
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        raise ShapeError(f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit; A is (r, n) and B is (m, r)")
    if d is not None and d.shape != A.shape[:1]:
        raise ShapeError(f"d has shape {tuple(d.shape)}; A is (r, n) = {tuple(A.shape)}, so ({A.shape[0]},) is wanted")
    if b is not None and b.shape != B.shape[:1]:
        raise ShapeError(f"b has shape {tuple(b.shape)}; B is (m, r) = {tuple(B.shape)}, so ({B.shape[0]},) is wanted")


def _check_x(x: Tensor, A: Tensor) -> None:
    if x.dim() < 1 or x.shape[-1] != A.shape[1]:
        raise ShapeError(f"x has shape {tuple(x.shape)}; A is (r, n) = {tuple(A.shape)}, so (..., {A.shape[1]}) is wanted")
