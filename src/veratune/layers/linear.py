"""VeraLinear: nn.Linear, Hugging Face's Conv1D, their fused parts, and quantized linears.

A plain base layer is read: its product and the adapter's are taken together, in the cheapest order. Any other
is called, so that whatever it does (quantized products, hooks, offloading) stays as it is, and the adapter's share is
added to its output.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veratune.errors import UnsupportedError
from veratune.layers.base import Part, Rows, VeraVectors, VeraWeightLayer, is_plain, product_dtype
from veratune.layers.quantized import is_dense
from veratune.ops.functional import is_full_precision, vera_rows


class VeraLinear(VeraWeightLayer):
    """y = W x + scale * b * (B (d * (A x))), for each part of W that an adapter changes.

    x: (..., n). Returns (..., m) in the dtype of the base layer's output.
    """

    @property
    def transposed(self) -> bool:
        """Whether the layer stores Wᵀ, as Hugging Face's Conv1D does."""
        return hasattr(self.base, "nf")

    def to_weight_layout(self, delta: Tensor, weight: Tensor) -> Tensor:
        return self._matrix(delta)

    def rows_of(self, weight: Tensor) -> int:
        return self._matrix(weight).shape[0]

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is not None:
            return self._mixed(x, self.base(x), self.rows)
        if self.current is None:
            return self.base(x)
        vectors = self.vectors(self.current)
        reason = self._fallback_reason(x, vectors[0])
        if reason is None:
            return self._fused_forward(x, self.current, vectors)
        if vectors[0].config.plan in ("projected", "merged"):
            raise UnsupportedError(
                f"plan={vectors[0].config.plan!r} puts ΔW into the weight of layer '{self.name}', but {reason}; "
                "use plan='auto', 'factored' or 'dense'"
            )
        return add_parts(self.base(x), [(own.part, own(x)) for own in vectors])

    def _fallback_reason(self, x: Tensor, vectors: VeraVectors) -> str | None:
        """Why the base layer cannot be read in place of a call for this x; None if it can."""
        base: Any = self.base
        if type(base) is not nn.Linear and type(base).__name__ != "Conv1D":
            return f"it is a {type(base).__name__}, whose product only it can take"
        if not is_plain(base):
            return "something hooks into its forward"
        weight: Tensor = base.weight
        if not is_dense(weight) or weight.device != x.device:
            return f"it is a {type(weight).__name__} on {weight.device}"
        if weight.requires_grad:
            return "it is trained itself"
        if x.dtype != weight.dtype or product_dtype(x) != weight.dtype:
            return f"it is {weight.dtype} and the product {product_dtype(x)}"
        if vectors.config.plan in ("projected", "merged") and not is_full_precision(weight.dtype):
            return f"{weight.dtype} would round a small ΔW away"
        return (
            "the adapter's input is dropped out"
            if vectors.config.dropout and self.training
            else None
        )

    def _fused_forward(self, x: Tensor, adapter: str, vectors: Sequence[VeraVectors]) -> Tensor:
        """W x and the adapter's share in one go."""
        base: Any = self.base
        bias = base.bias
        kept = self.cached_weights(adapter)
        if kept is not None:
            return F.linear(x, self._matrix(kept["weight"]), bias)
        weight = self._matrix(base.weight)
        if len(vectors) == 1 and vectors[0].part.out_features == weight.shape[0]:
            return vectors[0](x, weight, bias)  # type: ignore[no-any-return]
        pieces, at = [], 0

        def frozen(stop: int) -> None:
            if stop > at:
                pieces.append(F.linear(x, weight[at:stop], None if bias is None else bias[at:stop]))

        for own in vectors:
            start, stop = own.part.start, own.part.stop
            frozen(start)
            pieces.append(own(x, weight[start:stop], None if bias is None else bias[start:stop]))
            at = stop
        frozen(weight.shape[0])
        return torch.cat(pieces, dim=-1)

    def _matrix(self, weight: Tensor) -> Tensor:
        """W (m, n) of a stored weight."""
        return weight.t() if self.transposed else weight

    def _mixed(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        """Every row with its own adapter: one product for all rows that have basis, rank and part in common."""
        groups: dict[tuple[object, ...], list[tuple[VeraVectors, list[int]]]] = {}
        for name, found in rows.positions(x.shape[0], self.name).items():
            for vectors in self.vectors(name):
                config = vectors.config
                alike = (
                    vectors.part,
                    id(vectors.basis),
                    vectors.rank,
                    config.dropout,
                    config.vectors,
                    config.dtype,
                )
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
        None
        if getattr(first, name) is None
        else torch.stack([getattr(vectors, name) for vectors, _ in group])
        for name in ("d", "b")
    )
    A, B = first.pair(x.device, product_dtype(x))
    return vera_rows(first.apply_dropout(x), A, B, d, b, index, first.scale)


def add_parts(y: Tensor, shares: Sequence[tuple[Part, Tensor]]) -> Tensor:
    """Y with each share added to its part's columns; y itself is not written to. Parts rise and do not overlap."""
    if len(shares) == 1 and shares[0][0].out_features == y.shape[-1]:
        return y + shares[0][1].to(y.dtype)
    pieces, at = [], 0
    for part, share in shares:
        pieces += [y[..., at : part.start], y[..., part.start : part.stop] + share.to(y.dtype)]
        at = part.stop
    pieces.append(y[..., at:])
    return torch.cat(pieces, dim=-1)
