"""W + ΔW of adapters in evaluation, kept between calls: the frozen layer's price without merging.

Each use compares the vectors value by value and W by its memory, its count of writes and a sample
of its values. torch does not count writes through `.data`; the sample has a value of every row and
every column, so that a write of whole rows, columns or the matrix is seen.
"""

import dataclasses
import threading
import weakref
from typing import Protocol

import torch
from torch import Tensor

from veratune.errors import ConfigError
from veratune.lru import ByteLRU


class CacheableLayer(Protocol):
    """The part of VeraWeightLayer that the cache uses."""

    def cache_inputs(self, adapter: str) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The adapter's vectors, and the weights that it changes by parameter."""

    def merged_weights(self, adapter: str) -> dict[str, Tensor]:
        """W + ΔW by parameter."""


class _WeightState:
    """Identity of a weight's values: its memory, its count of writes, and a sample."""

    def __init__(self, weight: Tensor) -> None:
        self.key = _weight_key(weight)
        values = weight.detach().reshape(weight.shape[0], -1)
        rows, columns = values.shape
        steps = torch.arange(max(rows, columns), device=weight.device)
        self.index = (steps % rows, steps % columns)
        self.shape = (rows, columns)
        self.sample = values[self.index].clone()

    def is_of(self, weight: Tensor) -> bool:
        """Whether the weight has not changed since."""
        if self.key != _weight_key(weight):
            return False
        return torch.equal(weight.detach().reshape(self.shape)[self.index], self.sample)


def _weight_key(weight: Tensor) -> tuple[object, ...]:
    return (weight.data_ptr(), weight._version, weight.dtype, weight.device, weight.shape)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """W + ΔW of one layer and adapter, and the values it was computed from."""

    merged: dict[str, Tensor]
    vectors: list[Tensor]
    weights: list[_WeightState]

    def is_of(self, vectors: list[Tensor], weights: dict[str, Tensor]) -> bool:
        return (
            len(self.vectors) == len(vectors)
            and len(self.weights) == len(weights)
            and all(state.is_of(w) for state, w in zip(self.weights, weights.values(), strict=True))
            and all(torch.equal(a, b) for a, b in zip(self.vectors, vectors, strict=True))
        )


class WeightCache:
    """At most `limit` bytes of W + ΔW; the least recently used adapter makes room.

    An adapter never displaces its own layers: one that is too large keeps as many layers as fit.

    Args:
        limit: Bound in bytes, over all models that use this cache.
    """

    def __init__(self, limit: int) -> None:
        self._entries: ByteLRU[tuple[int, str], _Entry] = ByteLRU(limit)
        self._layers: weakref.WeakSet[CacheableLayer] = weakref.WeakSet()
        self._lock = threading.RLock()

    @property
    def limit(self) -> int:
        """Bound in bytes."""
        return self._entries.max_bytes

    @property
    def bytes(self) -> int:
        """Bytes of all kept weights."""
        return self._entries.used_bytes

    def entries(self) -> dict[tuple[int, str], dict[str, Tensor]]:
        """W + ΔW by (id of the layer, adapter), the least recently used first."""
        entries = {key: self._entries.peek(key) for key in self._entries}
        return {key: entry.merged for key, entry in entries.items() if entry is not None}

    def get(self, layer: CacheableLayer, adapter: str) -> dict[str, Tensor] | None:
        """Return W + ΔW of a layer by parameter, computed where needed; None without room."""
        key = (id(layer), adapter)
        vectors, weights = layer.cache_inputs(adapter)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.is_of(vectors, weights):
                return entry.merged
            self._entries.pop(key)
            size = sum(w.numel() * w.element_size() for w in weights.values())
            if not self._make_room(size, adapter):
                return None
            # Not as inference tensors: a later call may want the gradient of its input.
            with torch.inference_mode(False), torch.no_grad():
                entry = _Entry(
                    layer.merged_weights(adapter),
                    [v.detach().clone() for v in vectors],
                    [_WeightState(w) for w in weights.values()],
                )
            self._entries.put(key, entry, size)
            if layer not in self._layers:
                self._layers.add(layer)
                weakref.finalize(layer, self._discard, id(layer)).atexit = False
            return entry.merged

    def discard(self, layer: CacheableLayer) -> None:
        """Free the weights of a layer, of all adapters."""
        self._discard(id(layer))

    def resize(self, limit: int) -> None:
        """Change the bound in bytes; 0 keeps nothing."""
        with self._lock:
            self._entries.resize(limit)

    def _make_room(self, size: int, adapter: str) -> bool:
        # Stops at the first own layer: two adapters in turn would otherwise displace each other.
        while self.bytes + size > self.limit:
            oldest = next(iter(self._entries), None)
            if oldest is None or oldest[1] == adapter:
                return False
            self._entries.pop(oldest)
        return True

    def _discard(self, number: int) -> None:
        with self._lock:
            for key in [key for key in self._entries if key[0] == number]:
                self._entries.pop(key)


WEIGHTS = WeightCache(limit=2**30)


def cache_weights(limit: int) -> None:
    """Let adapters in evaluation keep W + ΔW in at most `limit` bytes, over all models.

    Args:
        limit: Bound in bytes; 0 keeps nothing. The default of the process is 1 GiB.

    Raises:
        ConfigError: `limit` is no integer of 0 or more.
    """
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
        raise ConfigError(f"limit is {limit!r}; it must be a number of bytes, 0 or more")
    WEIGHTS.resize(limit)
