"""VeRA on a mixed batch: every row with the vectors of its own adapter."""

from jaxtyping import Float, Integer
from torch import Tensor

from veratune.errors import ShapeError
from veratune.ops.checks import check_adapter, check_input
from veratune.ops.delta import scaled_vector
from veratune.ops.matrix import BlockMatrix, matmul


def vera_rows(
    x: Float[Tensor, "N *T n"],
    A: Float[Tensor, "r n"] | BlockMatrix,
    B: Float[Tensor, "m r"] | BlockMatrix,
    d: Float[Tensor, "k r"] | None,
    b: Float[Tensor, "k m"] | None,
    index: Integer[Tensor, " N"] | None,
    scale: float = 1.0,
    *,
    projected: Float[Tensor, "N *T r"] | None = None,
) -> Float[Tensor, "N *T m"]:
    """Apply one adapter per row: y[i] = scale * b[index[i]] * (B (d[index[i]] * (A x[i]))).

    Args:
        x: Activations of a batch of N rows, shape (N, *T, n).
        A: Frozen down-projection, shape (r, n).
        B: Frozen up-projection, shape (m, r).
        d: Rank scales of k adapters, shape (k, r); None for ones.
        b: Output scales of k adapters, shape (k, m); None for ones.
        index: Adapter of each row, shape (N,), in [0, k). None: d and b are given per row, k = N.
        scale: Factor s of the basis.
        projected: A x, where it is computed already, shape (N, *T, r).

    Returns:
        The update, shape (N, *T, m). Gradients flow to x, d and b.

    Raises:
        ShapeError: names the argument, what was found and what was wanted.

    >>> import torch
    >>> A, B, index = torch.ones(4, 8), torch.ones(6, 4), torch.tensor([2, 0])
    >>> vera_rows(torch.ones(2, 8), A, B, torch.ones(3, 4), torch.ones(3, 6), index).shape
    torch.Size([2, 6])
    """
    check_adapter(A, B, None if d is None else d[0], None if b is None else b[0])
    check_input(x, A)
    if index is not None and index.shape != x.shape[:1]:
        raise ShapeError(
            f"index has shape {tuple(index.shape)}; x has {x.shape[0]} rows, "
            f"so ({x.shape[0]},) is wanted"
        )
    middle = (1,) * (x.dim() - 2)

    def per_row(vectors: Tensor) -> Tensor:
        chosen = vectors if index is None else vectors.index_select(0, index)
        return chosen.view(x.shape[0], *middle, vectors.shape[1])

    z = matmul(A, x) if projected is None else projected
    z = z * scale if d is None else z * scaled_vector(per_row(d), scale, z.dtype)
    y = matmul(B, z)
    return y if b is None else y * per_row(b).to(y.dtype)
