"""Prefix caching: the KV cache of a finished request is reused by later requests that start alike.

Keys and values depend on the adapter, so an entry belongs to its tenant, adapter and version as
well as to its tokens. Entries are never shared between tenants: response times leak nothing about
other tenants' prompts.
"""

import bisect
import dataclasses
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from veratune.lru import ByteLRU
from veratune.serving.pool.lease import Key

Owner = tuple[str, Key | None]  # the tenant, and the adapter's key with its version
MIN_TOKENS = 8  # fewer are computed sooner than copied
Tokens = npt.NDArray[np.uint32]


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens, and each layer's keys and values of them.

    Args:
        tokens: Token ids, shape (tokens,).
        layers: (keys, values) of each layer, shape (1, heads, tokens, width) each.
    """

    tokens: Tokens
    layers: list[tuple[Tensor, Tensor]]

    @property
    def size(self) -> int:
        """Bytes of the keys and values."""
        return sum(t.numel() * t.element_size() for pair in self.layers for t in pair)

    def common(self, tokens: Tokens) -> int:
        """Return how many first tokens both have in common."""
        size = min(len(self.tokens), len(tokens))
        different = self.tokens[:size] != tokens[:size]
        return int(different.argmax()) if different.any() else size


class PrefixCache:
    """At most `max_bytes` of prefixes; the least recently used ones leave first. Thread-safe.

    An owner's prefixes are sorted, so the one with the longest common beginning stands beside the
    place of the prompt: a look-up takes the logarithm of their number.
    """

    def __init__(self, max_bytes: int) -> None:
        self._entries: ByteLRU[tuple[Owner, bytes], Prefix] = ByteLRU(
            max_bytes, on_evict=self._on_evict
        )
        self._sorted: dict[Owner, list[bytes]] = {}
        self._lock = threading.Lock()

    @property
    def max_bytes(self) -> int:
        """Bound of the prefixes' bytes."""
        return self._entries.max_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of all prefixes."""
        return self._entries.used_bytes

    def find(self, owner: Owner, tokens: Sequence[int]) -> tuple[Prefix, int] | None:
        """Return the prefix with the longest common beginning, and the length of that.

        The last token of the prompt never counts, as its logits have to be computed.
        """
        prompt = np.asarray(tokens[:-1], np.uint32)
        key = _sort_key(prompt)
        with self._lock:
            own = self._sorted.get(owner, [])
            place = bisect.bisect_left(own, key)
            best: tuple[bytes, int] | None = None
            for neighbour in own[max(0, place - 1) : place + 1]:
                prefix = self._entries.peek((owner, neighbour))
                size = prefix.common(prompt) if prefix is not None else 0
                if size >= MIN_TOKENS and (best is None or size > best[1]):
                    best = neighbour, size
            if best is None:
                return None
            found = self._entries.get((owner, best[0]))
            return None if found is None else (found, best[1])

    def add(self, owner: Owner, tokens: Sequence[int], layers: list[tuple[Tensor, Tensor]]) -> None:
        """Store a prefix; it replaces those of its owner that it continues."""
        new = Prefix(np.asarray(tokens, np.uint32), layers)
        if len(tokens) < MIN_TOKENS or new.size > self.max_bytes:
            return
        key = _sort_key(new.tokens)
        with self._lock:
            for old in self._continued_by(owner, key):
                self._entries.pop((owner, old))
            if self._entries.put((owner, key), new, new.size):
                bisect.insort(self._sorted.setdefault(owner, []), key)

    def remove_adapter(self, key: Key) -> None:
        """Remove every prefix that was computed with an adapter."""
        with self._lock:
            self._remove([owner for owner in self._sorted if owner[1] == key])

    def remove_tenant(self, tenant: str) -> None:
        """Remove every prefix of a tenant."""
        with self._lock:
            self._remove([owner for owner in self._sorted if owner[0] == tenant])

    def _remove(self, owners: Sequence[Owner]) -> None:
        for owner in owners:
            for tokens in list(self._sorted[owner]):
                self._entries.pop((owner, tokens))

    def _continued_by(self, owner: Owner, key: bytes) -> list[bytes]:
        """Return the owner's entries with which `key` begins, `key` itself among them."""
        own, found = self._sorted.get(owner, []), []
        place = bisect.bisect_right(own, key)
        while place:
            entry = own[place - 1]
            if key.startswith(entry):
                found.append(entry)
                place -= 1
                continue
            # Whatever `key` begins with is no longer than its common beginning with this entry.
            size = min(len(entry), len(key))
            common = next(i for i in range(0, size, 4) if entry[i : i + 4] != key[i : i + 4])
            place = bisect.bisect_right(own, key[:common], hi=place - 1)
        return found

    def _on_evict(self, key: tuple[Owner, bytes], prefix: Prefix) -> None:
        owner, tokens = key
        own = self._sorted[owner]
        del own[bisect.bisect_left(own, tokens)]
        if not own:
            del self._sorted[owner]


def _sort_key(tokens: Tokens) -> bytes:
    """Return bytes that sort as the tokens do."""
    return tokens.astype(">u4").tobytes()
