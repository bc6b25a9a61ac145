"""VeraLinear: nn.Linear, Hugging Face's Conv1D, their fused parts, and quantized linears.

The weight of a plain base layer is read, so that its product and the adapter's are taken in the
cheapest order. Any other layer (quantized, hooked, offloaded) is called, and the update is added to
its output.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from veratune.errors import UnsupportedError
from veratune.layers.kinds import is_conv1d, stores_transposed, weight_matrix
from veratune.layers.quantized import is_dense
from veratune.layers.rows import Rows, scatter_rows
from veratune.layers.vectors import Part, VeraVectors, product_dtype
from veratune.layers.weight_layer import VeraWeightLayer, is_plain
from veratune.ops.delta import is_full_precision
from veratune.ops.rows import vera_rows


class VeraLinear(VeraWeightLayer):
    """y = W x + scale * b * (B (d * (A x))), for each part of W that an adapter changes."""

    @property
    def transposed(self) -> bool:
        """Whether the layer stores Wᵀ, as Hugging Face's Conv1D does."""
        return stores_transposed(self.base)

    def to_weight_layout(self, delta: Float[Tensor, "m n"], weight: Tensor) -> Tensor:
        return weight_matrix(self.base, delta)

    def rows_of(self, weight: Tensor) -> int:
        return weight_matrix(self.base, weight).shape[0]

    def forward(self, x: Float[Tensor, "*T n"]) -> Float[Tensor, "*T m"]:
        """Compute the adapted output, in the dtype of the base layer's output."""
        self.check_recomputation()
        if self.rows is not None:
            return self._mixed_forward(x, self.base(x), self.rows)
        if self.current is None:
            return cast(Tensor, self.base(x))
        vectors = self.vectors(self.current)
        reason = self._fallback_reason(x, vectors[0])
        if reason is None:
            return self._fused_forward(x, self.current, vectors)
        if vectors[0].config.plan in ("projected", "merged"):
            raise UnsupportedError(
                f"plan={vectors[0].config.plan!r} puts ΔW into the weight of layer '{self.name}', "
                f"but {reason}; use plan='auto', 'factored' or 'dense'"
            )
        y = self.base(x)
        if not isinstance(y, Tensor):
            raise UnsupportedError(
                f"layer '{self.name}' is a {type(self.base).__name__}, which returns a "
                f"{type(y).__name__}; an adapter adds to a tensor, so exclude it"
            )
        return add_to_parts(y, [(v.part, v(x)) for v in vectors])

    def _fallback_reason(self, x: Tensor, vectors: VeraVectors) -> str | None:
        """Why the base layer must be called for this x; None if its weight can be read."""
        base = self.base
        if type(base) is not nn.Linear and not is_conv1d(base):
            return f"it is a {type(base).__name__}, whose product only it can take"
        if not is_plain(base):
            return "something hooks into its forward"
        weight = cast(Tensor, base.weight)
        if not is_dense(weight) or weight.device != x.device:
            return f"it is a {type(weight).__name__} on {weight.device}"
        if weight.requires_grad:
            return "it is trained itself"
        if x.dtype != weight.dtype or product_dtype(x) != weight.dtype:
            return f"it is {weight.dtype} and the product {product_dtype(x)}"
        if vectors.config.plan in ("projected", "merged") and not is_full_precision(weight.dtype):
            return f"{weight.dtype} would round a small ΔW away"
        if vectors.config.dropout and self.training:
            return "the adapter's input is dropped out"
        return None

    def _fused_forward(self, x: Tensor, adapter: str, vectors: Sequence[VeraVectors]) -> Tensor:
        """W x and the update in one order of products."""
        bias = cast(Tensor | None, self.base.bias)
        merged = self.cached_weights(adapter)
        if merged is not None:
            return F.linear(x, weight_matrix(self.base, merged["weight"]), bias)
        weight = weight_matrix(self.base, cast(Tensor, self.base.weight))
        if len(vectors) == 1 and vectors[0].part.out_features == weight.shape[0]:
            return cast(Tensor, vectors[0](x, weight, bias))
        pieces: list[Tensor] = []
        done = 0

        def frozen(stop: int) -> None:
            if stop > done:
                rows = slice(done, stop)
                pieces.append(F.linear(x, weight[rows], None if bias is None else bias[rows]))

        for v in vectors:
            rows = slice(v.part.start, v.part.stop)
            frozen(v.part.start)
            pieces.append(v(x, weight[rows], None if bias is None else bias[rows]))
            done = v.part.stop
        frozen(weight.shape[0])
        return torch.cat(pieces, dim=-1)

    def _mixed_forward(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        """Each row with its own adapter: one product for rows with the same basis, rank and
        part.
        """
        groups: dict[tuple[object, ...], list[tuple[VeraVectors, list[int]]]] = {}
        for name, positions in rows.positions(x.shape[0], self.name).items():
            for vectors in self.vectors(name):
                groups.setdefault(_batch_key(vectors), []).append((vectors, positions))
        for group in groups.values():
            index = torch.tensor([i for _, positions in group for i in positions], device=x.device)
            update = _grouped_update(x.index_select(0, index), group)
            part = group[0][0].part
            y = add_to_parts(y, [(part, scatter_rows(update, index, y.shape[0]))])
        return y


def _batch_key(vectors: VeraVectors) -> tuple[object, ...]:
    """Vectors with equal keys can be computed in one product."""
    config = vectors.config
    return (
        vectors.part,
        id(vectors.basis),
        vectors.rank,
        config.dropout,
        config.vectors,
        config.dtype,
    )


def _grouped_update(x: Tensor, group: Sequence[tuple[VeraVectors, list[int]]]) -> Tensor:
    """The updates of rows whose adapters have equal batch keys; rows in the group's order."""
    first = group[0][0]
    index = torch.tensor(
        [k for k, (_, positions) in enumerate(group) for _ in positions], device=x.device
    )
    d = None if first.d is None else torch.stack([cast(Tensor, v.d) for v, _ in group])
    b = None if first.b is None else torch.stack([cast(Tensor, v.b) for v, _ in group])
    A, B = first.pair(x.device, product_dtype(x))
    return vera_rows(first.apply_dropout(x), A, B, d, b, index, first.scale)


def add_to_parts(
    y: Float[Tensor, "*T m"], updates: Sequence[tuple[Part, Tensor]]
) -> Float[Tensor, "*T m"]:
    """y plus each update at its part's columns; y itself is not written to.

    Args:
        y: Output of the whole layer, shape (*T, m).
        updates: (part, update) pairs in rising order without overlap; updates are (*T, part size).

    Returns:
        The sum, shape (*T, m), in y's dtype.
    """
    if len(updates) == 1 and updates[0][0].out_features == y.shape[-1]:
        return y + updates[0][1].to(y.dtype)
    pieces: list[Tensor] = []
    done = 0
    for part, update in updates:
        pieces += [y[..., done : part.start], y[..., part.start : part.stop] + update.to(y.dtype)]
        done = part.stop
    pieces.append(y[..., done:])
    return torch.cat(pieces, dim=-1)
