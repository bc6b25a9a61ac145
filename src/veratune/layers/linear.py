"""VeraLinear: nn.Linear, Hugging Face's Conv1D, their fused parts, and quantized linears.

The base layer is called, not read, so whatever it does (quantized products, hooks, offloading) stays as
it is; the adapter's share is added to its output.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from veratune.functional import vera_rows
from veratune.layers.base import Part, Rows, VeraVectors, VeraWeightLayer, product_dtype


class VeraLinear(VeraWeightLayer):
    """y = W x + scale * b * (B (d * (A x))), for each part of W that an adapter changes.

    x: (..., n). Returns (..., m) in the dtype of the base layer's output.
    """

    @property
    def transposed(self) -> bool:
        return hasattr(self.base, "nf")

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.rows is not None:
            return self._mixed(x, y, self.rows)
        if self.current is None:
            return y
        return add_parts(y, [(vectors.part, vectors(x)) for vectors in self.vectors(self.current)])

    def _mixed(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        """Every row with its own adapter: one product for all rows that have basis, rank and part in common."""
        groups: dict[tuple[object, ...], list[tuple[VeraVectors, list[int]]]] = {}
        for name, found in rows.positions(x.shape[0], self.name).items():
            for vectors in self.vectors(name):
                config = vectors.config
                alike = (vectors.part, id(vectors.basis), vectors.rank, config.dropout, config.vectors, config.dtype)
                groups.setdefault(alike, []).append((vectors, found))
        for group in groups.values():
            index = torch.tensor([i for _, found in group for i in found], device=x.device)
            share = _group(x.index_select(0, index), group)
            whole = share.new_zeros(*y.shape[:-1], share.shape[-1]).index_copy(0, index, share)
            y = add_parts(y, [(group[0][0].part, whole)])
        return y


def _group(x: Tensor, group: list[tuple[VeraVectors, list[int]]]) -> Tensor:
    """The shares of rows whose adapters have basis, rank and dropout in common, rows in the group's order."""
    first = group[0][0]
    index = torch.tensor([k for k, (_, found) in enumerate(group) for _ in found], device=x.device)
    d, b = (
        None if getattr(first, name) is None else torch.stack([getattr(vectors, name) for vectors, _ in group])
        for name in ("d", "b")
    )
    A, B = first.pair(x.device, product_dtype(x))
    return vera_rows(first.drop(x), A, B, d, b, index, first.scale)


def add_parts(y: Tensor, shares: Sequence[tuple[Part, Tensor]]) -> Tensor:
    """y with each share added to its part's columns; y itself is not written to. Parts rise and do not overlap."""
    if len(shares) == 1 and shares[0][0].out_features == y.shape[-1]:
        return y + shares[0][1].to(y.dtype)
    pieces, at = [], 0
    for part, share in shares:
        pieces += [y[..., at : part.start], y[..., part.start : part.stop] + share.to(y.dtype)]
        at = part.stop
    pieces.append(y[..., at:])
    return torch.cat(pieces, dim=-1)
