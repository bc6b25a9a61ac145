"""Frozen matrices: a dense tensor, or small blocks that multiply in a fraction of the work.

A and B made of blocks are a Monarch matrix with d between its factors (Dao et al., ICML 2022, arXiv
2204.00595). With k = r / q and inputs, inner values and outputs seen as grids,

    x: (q, n / q)        z = A x: (q, k)        y = B z: (m / k, k)

A mixes each row of the grid by itself, B each column. Every output still depends on every input,
each through its own d. Where a size is no multiple, the grid is larger and the excess is cut off.
"""

import abc
import dataclasses
import functools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CacheKey = tuple[object, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class BlockMatrix(abc.ABC):
    """A frozen matrix, given by its blocks.

    Args:
        shape: (rows, columns) of the matrix.
        values: The blocks.
    """

    shape: tuple[int, int]
    values: Tensor

    @abc.abstractmethod
    def matmul(self, x: Float[Tensor, "*T columns"]) -> Float[Tensor, "*T rows"]:
        """M x for each row of x."""

    @abc.abstractmethod
    def rmatmul(self, y: Float[Tensor, "*T rows"]) -> Float[Tensor, "*T columns"]:
        """Mᵀ y for each row of y."""

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def dense(self) -> Float[Tensor, "rows columns"]:
        """The matrix with all its zeros."""
        return self.rmatmul(torch.eye(self.shape[0], dtype=self.dtype, device=self.values.device))


class RowBlocks(BlockMatrix):
    """A (r, n): block i maps inputs i c .. i c + c to inner values i k .. i k + k.

    `values` has shape (q, k, c), with q k >= r and q c >= n.
    """

    def matmul(self, x: Float[Tensor, "*T columns"]) -> Float[Tensor, "*T rows"]:
        q, _, c = self.values.shape
        z = torch.einsum("tqc,qkc->tqk", _grid(x, q, c), self.values)
        return _flat(z, x, self.shape[0])

    def matmul_columns(self, x: Float[Tensor, "*T columns"]) -> Float[Tensor, "qk T"]:
        """A X^T for all T rows of x: inner values as rows, those beyond r included."""
        q, k, c = self.values.shape
        return torch.bmm(self.values, _grid(x, q, c).permute(1, 2, 0)).view(q * k, -1)

    def rmatmul(self, y: Float[Tensor, "*T rows"]) -> Float[Tensor, "*T columns"]:
        q, k, _ = self.values.shape
        x = torch.einsum("tqk,qkc->tqc", _grid(y, q, k), self.values)
        return _flat(x, y, self.shape[1])


class ColumnBlocks(BlockMatrix):
    """B (m, r): output (a, j) is made of the inner values (i, j), by the same block for every j.

    `values` has shape (s, q). The grid has k columns, with q k >= r and s k >= m.
    """

    def matmul(self, x: Float[Tensor, "*T columns"]) -> Float[Tensor, "*T rows"]:
        grid = _grid(x, self.values.shape[1], self.columns)
        return _flat(torch.matmul(self.values, grid), x, self.shape[0])

    def rmatmul(self, y: Float[Tensor, "*T rows"]) -> Float[Tensor, "*T columns"]:
        grid = _grid(y, self.values.shape[0], self.columns)
        return _flat(torch.matmul(self.values.t(), grid), y, self.shape[1])

    @property
    def columns(self) -> int:
        """k: r inner values in q rows."""
        return math.ceil(self.shape[1] / self.values.shape[1])


def grid_rows(rank: int, in_features: int) -> int:
    """Choose q, the rows of the grid of inner values.

    q is near the root of r, so that both factors are small, and a divisor of n and r where one is
    near enough.

    >>> grid_rows(768, 768), grid_rows(1024, 768), grid_rows(256, 768), grid_rows(5, 7)
    (24, 32, 32, 1)
    """
    choose = _choose_grid_rows if torch.compiler.is_compiling() else _known_grid_rows
    return choose(rank, in_features)


def _choose_grid_rows(rank: int, in_features: int) -> int:
    """The q with the least work, for whole blocks rather than cut ones."""

    def cost(q: int) -> float:
        k, c = math.ceil(rank / q), math.ceil(in_features / q)
        waste = 1.0 if q * c == in_features else 1.25
        return (q * k * c + q * k * q) * (waste if q * k == rank else waste * 1.1)

    return min(range(1, 2 * math.isqrt(rank) + 2), key=cost)


# torch 2.13's compiler does not trace a cached function.
_known_grid_rows = functools.lru_cache(maxsize=1024)(_choose_grid_rows)


def _grid(x: Tensor, rows: int, columns: int) -> Tensor:
    """(*T, n) as (T, rows, columns), padded with zeros."""
    return pad_to(x.reshape(-1, x.shape[-1]), rows * columns).view(-1, rows, columns)


def pad_to(x: Float[Tensor, "*T n"], size: int) -> Float[Tensor, "*T size"]:
    """x with zeros up to `size` columns; x itself where it has them."""
    padding = size - x.shape[-1]
    return F.pad(x, (0, padding)) if padding else x


def _flat(grid: Tensor, like: Tensor, size: int) -> Tensor:
    """(T, rows, columns) as (*T, size)."""
    return grid.reshape(*like.shape[:-1], grid.shape[1] * grid.shape[2])[..., :size]


Matrix = Tensor | BlockMatrix


def matmul(matrix: Matrix, x: Float[Tensor, "*T columns"]) -> Float[Tensor, "*T rows"]:
    """M x for each row of x."""
    return matrix.matmul(x) if isinstance(matrix, BlockMatrix) else F.linear(x, matrix)


def rmatmul(matrix: Matrix, y: Float[Tensor, "*T rows"]) -> Float[Tensor, "*T columns"]:
    """Mᵀ y for each row of y."""
    return matrix.rmatmul(y) if isinstance(matrix, BlockMatrix) else y.matmul(matrix)


def dense(matrix: Matrix) -> Tensor:
    """The matrix as one tensor."""
    return matrix.dense() if isinstance(matrix, BlockMatrix) else matrix


def cache_key(matrix: Matrix) -> CacheKey:
    """A key that differs between two matrices, and between a matrix before and after a write."""
    values = matrix.values if isinstance(matrix, BlockMatrix) else matrix
    return (
        matrix.shape,
        values.data_ptr(),
        values._version,
        values.shape,
        values.stride(),
        values.dtype,
        values.device,
    )
