"""W + ΔW of adapters that are not being trained, kept between calls: inference at the frozen layer's price without merging.

What is kept is checked at every use against the vectors, value by value, and against W's memory and count of
writes, so an adapter that was updated in any way is never answered from an old sum.
"""

import collections
import dataclasses
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from veratune.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class _Entry:
    """The weights of one layer with one adapter in them, and what they were made of."""

    weights: dict[str, Tensor]
    vectors: list[Tensor]
    bases: tuple[Any, ...]

    @property
    def bytes(self) -> int:
        return sum(w.numel() * w.element_size() for w in self.weights.values())

    def is_of(self, vectors: list[Tensor], bases: tuple[Any, ...]) -> bool:
        return self.bases == bases and all(
            torch.equal(a, b) for a, b in zip(self.vectors, vectors, strict=True)
        )


class WeightCache:
    """At most `limit` bytes of W + ΔW over all models of the process; the adapter used longest ago makes room.

    An adapter never displaces its own layers: one that is too large for the limit keeps as many layers as fit.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._entries: collections.OrderedDict[tuple[int, str], _Entry] = collections.OrderedDict()
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.RLock()

    def get(self, layer: Any, adapter: str) -> dict[str, Tensor] | None:
        """The weights of a VeraWeightLayer with the adapter in them, by parameter; None where there is no room."""
        key = (id(layer), adapter)
        vectors = [p for own in layer.vectors(adapter) for p in own.parameters()]
        parameters = {
            own.part.parameter: layer.weight_of(own.part.parameter)
            for own in layer.vectors(adapter)
        }
        bases = tuple(
            (w.data_ptr(), w._version, w.dtype, w.device, w.shape) for w in parameters.values()
        )
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.is_of(vectors, bases):
                self._entries.move_to_end(key)
                return entry.weights
            self._drop(key)
            size = sum(w.numel() * w.element_size() for w in parameters.values())
            if not self._make_room(size, adapter):
                return None
            with torch.no_grad():
                made = layer.merged_weights(adapter)
            entry = _Entry(made, [v.detach().clone() for v in vectors], bases)
            self._entries[key] = entry
            self.bytes += entry.bytes
            if layer not in self._known:
                self._known.add(layer)
                weakref.finalize(layer, self._drop_layer, id(layer)).atexit = False
            return entry.weights

    def drop(self, layer: Any) -> None:
        """Forget a layer."""
        self._drop_layer(id(layer))

    def resize(self, limit: int) -> None:
        """Another limit in bytes; 0 keeps nothing."""
        with self._lock:
            self.limit = limit
            while self.bytes > limit:
                self._drop(next(iter(self._entries)))

    def _make_room(self, size: int, adapter: str) -> bool:
        while self.bytes + size > self.limit:
            oldest = next(iter(self._entries), None)
            if oldest is None or oldest[1] == adapter:
                return False
            self._drop(oldest)
        return True

    def _drop_layer(self, number: int) -> None:
        with self._lock:
            for key in [k for k in self._entries if k[0] == number]:
                self._drop(key)

    def _drop(self, key: tuple[int, str]) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.bytes -= entry.bytes


WEIGHTS = WeightCache(limit=2**30)


def cache_weights(limit: int) -> None:
    """Let adapters in evaluation keep W + ΔW in at most `limit` bytes, over all models (default: 1 GiB; 0: nothing).

    Raises ConfigError for a negative limit.
    """
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
        raise ConfigError(f"limit is {limit!r}; it must be a number of bytes, 0 or more")
    WEIGHTS.resize(limit)
