"""Shape checks of the public functions: one line with what was found and what was wanted."""

from torch import Tensor

from veratune.errors import ShapeError
from veratune.ops.matrix import Matrix


def check_adapter(A: Matrix, B: Matrix, d: Tensor | None, b: Tensor | None) -> None:
    """Raise ShapeError unless A (r, n), B (m, r), d (r,) and b (m,) fit together."""
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1]:
        raise ShapeError(
            f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit; A is (r, n) and B is (m, r)"
        )
    if d is not None and d.shape != A.shape[:1]:
        raise ShapeError(
            f"d has shape {tuple(d.shape)}; A is (r, n) = {tuple(A.shape)}, "
            f"so ({A.shape[0]},) is wanted"
        )
    if b is not None and b.shape != B.shape[:1]:
        raise ShapeError(
            f"b has shape {tuple(b.shape)}; B is (m, r) = {tuple(B.shape)}, "
            f"so ({B.shape[0]},) is wanted"
        )


def check_input(x: Tensor, A: Matrix) -> None:
    """Raise ShapeError unless x is (..., n) for A (r, n)."""
    if x.dim() < 1 or x.shape[-1] != A.shape[1]:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}; A is (r, n) = {tuple(A.shape)}, "
            f"so (..., {A.shape[1]}) is wanted"
        )
