"""A least-recently-used cache that is bounded by bytes, not by entries."""

import collections
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class ByteLRU(Generic[K, V]):
    """Map of keys to values of known sizes, at most `max_bytes` in sum.

    Iteration goes from the least to the most recently used key. Not thread-safe: the owner locks.

    Args:
        max_bytes: Upper bound of the sum of all sizes, in bytes.
        on_evict: Called with (key, value) of each entry that leaves, for whatever reason.

    >>> cache = ByteLRU(10)
    >>> cache.put("a", "first", 6), cache.put("b", "second", 4), cache.get("a")
    (True, True, 'first')
    >>> cache.put("c", "third", 4), list(cache), cache.used_bytes
    (True, ['a', 'c'], 10)
    >>> cache.put("d", "larger than all room", 11)
    False
    """

    def __init__(self, max_bytes: int, *, on_evict: Callable[[K, V], object] | None = None) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._entries: collections.OrderedDict[K, tuple[V, int]] = collections.OrderedDict()
        self._on_evict = on_evict

    def get(self, key: K) -> V | None:
        """Return the value of a key and mark it as the most recently used; None if absent."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def peek(self, key: K) -> V | None:
        """Return the value of a key without marking it as used; None if absent."""
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def put(
        self, key: K, value: V, size: int, *, evictable: Callable[[K, V], bool] | None = None
    ) -> bool:
        """Store a value as the most recently used one; an older value of the key leaves first.

        Args:
            key: Key of the entry.
            value: Value of the entry.
            size: Size of the value, in bytes.
            evictable: Which entries may leave to make room; all if omitted.

        Returns:
            Whether the value was stored. If there is no room for it, nothing else leaves either.
        """
        self.pop(key)
        if not self.make_room(size, evictable=evictable):
            return False
        self._entries[key] = (value, size)
        self.used_bytes += size
        return True

    def make_room(self, size: int, *, evictable: Callable[[K, V], bool] | None = None) -> bool:
        """Evict the least recently used entries until `size` more bytes fit.

        Returns:
            Whether they fit. If they cannot, nothing is evicted.
        """
        missing = self.used_bytes + size - self.max_bytes
        leaving: list[K] = []
        for key, (value, own_size) in self._entries.items():
            if missing <= 0:
                break
            if evictable is None or evictable(key, value):
                leaving.append(key)
                missing -= own_size
        if missing > 0:
            return False
        for key in leaving:
            self.pop(key)
        return True

    def pop(self, key: K) -> V | None:
        """Remove a key and return its value; None if absent."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        self.used_bytes -= entry[1]
        if self._on_evict is not None:
            self._on_evict(key, entry[0])
        return entry[0]

    def resize(self, max_bytes: int) -> None:
        """Change the bound; the least recently used entries over it leave."""
        self.max_bytes = max_bytes
        while self.used_bytes > self.max_bytes and self._entries:
            self.pop(next(iter(self._entries)))

    def clear(self) -> None:
        """Remove every entry."""
        for key in list(self._entries):
            self.pop(key)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[K]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
