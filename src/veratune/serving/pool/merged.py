"""MergedWeights: W + ΔW of the adapter that whole batches use, which then cost one product.

One adapter at a time has them. Batches of several adapters take the factored products.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from veratune.layers.few_rows import wrapped_linear
from veratune.layers.kinds import is_conv1d, weight_matrix
from veratune.layers.quantized import is_dense
from veratune.layers.vectors import product_dtype
from veratune.layers.weight_layer import is_plain
from veratune.ops.delta import is_full_precision
from veratune.serving.pool.slots import SlotGroup

if TYPE_CHECKING:
    from veratune.serving.pool.batch import AdapterBatch

_LAYERS_PER_PASS = 4  # merging a layer costs what r tokens cost there; no pass waits for many


@dataclasses.dataclass
class _Merged:
    """The merged layers of one slot, and the tokens that each layer computed unmerged."""

    group: SlotGroup[Any]
    slot: int
    weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    bytes: int = 0


class MergedWeights:
    """Merges the adapter that all rows of the last passes used, layer by layer.

    A token costs r (m + n) beside W x, and merging a layer m n r. So a layer merges after
    m n / (m + n) tokens, and never costs more than twice the cheaper choice.

    Args:
        max_bytes: Bound of the merged weights; layers that do not fit stay factored. 0: none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._held: _Merged | None = None
        self._next: _Merged | None = None  # counts tokens until it replaces the held one
        self._current: _Merged | None = None
        self._room = 0

    @property
    def bytes(self) -> int:
        """Bytes of the merged weights."""
        held = self._held
        return 0 if held is None else held.bytes

    @property
    def layers(self) -> list[str]:
        """Paths of the merged layers."""
        held = self._held
        return [] if held is None else list(held.weights)

    @property
    def owner(self) -> tuple[SlotGroup[Any], int] | None:
        """Group and slot of the adapter in the merged weights."""
        held = self._held
        return None if held is None else (held.group, held.slot)

    def begin(self, batch: "AdapterBatch | None") -> None:
        """Begin a pass of this batch."""
        self._room, self._current = _LAYERS_PER_PASS, None
        single = batch.single if batch is not None and self.max_bytes else None
        if single is None:
            return
        held = self._held
        if held is not None and (held.group, held.slot) == single:
            self._current, self._next = held, None
            return
        if self._next is None or (self._next.group, self._next.slot) != single:
            self._next = _Merged(*single)
        self._current = self._next

    def forget(self, group: SlotGroup[Any], slot: int) -> None:
        """Drop the weights of a slot that no request uses. Any thread may call this."""
        for name in ("_held", "_next"):
            found: _Merged | None = getattr(self, name)
            if found is not None and (found.group, found.slot) == (group, slot):
                setattr(self, name, None)

    def clear(self) -> None:
        """Drop all weights."""
        self._held = self._next = self._current = None

    def weight(self, name: str, layer: nn.Module, x: Tensor) -> Tensor | None:
        """Return W + ΔW, shape (m, n), for this pass; None: take the factored products.

        Args:
            name: Path of the layer in the model.
            layer: The base layer.
            x: Its input.
        """
        current = self._current
        if current is None:
            return None
        found = current.weights.get(name)
        if found is not None:
            return found if product_dtype(x) == x.dtype == found.dtype else None
        linear = wrapped_linear(layer)
        if not self._room or not _can_merge(linear, x) or name not in current.group.layers:
            return None
        stored = cast(Tensor, linear.weight)
        m, n = weight_matrix(linear, stored).shape
        tokens = current.tokens[name] = current.tokens.get(name, 0) + x.numel() // n
        size = stored.numel() * stored.element_size()
        if tokens * (m + n) < m * n or current.bytes + size > self.max_bytes:
            return None
        if current is not self._held:
            self._held, self._next = current, None
        self._room -= 1
        merged = weight_matrix(linear, stored).detach().clone()
        for slot_site in current.group.layers[name]:
            part = slot_site.site.part
            delta = current.group.delta(slot_site, current.slot, merged.dtype)
            merged[part.start : part.stop] += delta
        current.weights[name] = merged
        current.bytes += size
        return merged


def _can_merge(layer: nn.Module, x: Tensor) -> bool:
    """Whether the layer's product is with a dense full-precision W that may be read."""
    if (type(layer) is not nn.Linear and not is_conv1d(layer)) or not is_plain(layer):
        return False
    weight = cast(Tensor, layer.weight)
    return (
        is_dense(weight)
        and is_full_precision(weight.dtype)
        and weight.device == x.device
        and product_dtype(x) == x.dtype == weight.dtype
    )
