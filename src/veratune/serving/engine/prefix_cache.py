"""PrefixCache: keys and values of texts that were read, kept for the next request that begins alike, such as the next turn of a conversation.

What a layer makes of a text depends on the adapter, so a prefix is known by its tenant, adapter and version as well as by its tokens: none
is ever another's, and how fast an answer comes tells nobody what others asked.
"""

import collections
import dataclasses
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from veratune.serving.pool.pool import Key

Owner = tuple[str, Key | None]  # tenant, and adapter with its version
LEAST = 8  # tokens; fewer are read again sooner than copied


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens, and for each layer the keys and values (1, heads, tokens, width) that a model made of them."""

    tokens: npt.NDArray[np.int64]
    layers: list[tuple[Tensor, Tensor]]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self.layers for t in pair)

    def common(self, tokens: npt.NDArray[np.int64]) -> int:
        """How many tokens both begin with."""
        size = min(len(self.tokens), len(tokens))
        other = self.tokens[:size] != tokens[:size]
        return int(other.argmax()) if other.any() else size


class PrefixCache:
    """At most `limit` bytes of prefixes; those that were used longest ago make room. Methods may be called from any thread."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._kept: collections.OrderedDict[Owner, list[Prefix]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def find(self, owner: Owner, tokens: Sequence[int]) -> tuple[Prefix, int] | None:
        """What is kept of the beginning of a prompt, and how many of its tokens; never all of them, since the last one's logits are wanted."""
        asked = np.asarray(tokens[:-1], np.int64)
        with self._lock:
            own = self._kept.get(owner, [])
            sizes = [prefix.common(asked) for prefix in own]
            if not sizes or max(sizes) < LEAST:
                return None
            size = max(sizes)
            found = own[sizes.index(size)]
            self._use(owner, found)
            return found, size

    def keep(
        self, owner: Owner, tokens: Sequence[int], layers: list[tuple[Tensor, Tensor]]
    ) -> None:
        """Keep a prefix in place of those that it goes on from."""
        new = Prefix(np.asarray(tokens, np.int64), layers)
        if len(tokens) < LEAST or new.bytes > self.limit:
            return
        with self._lock:
            for old in list(self._kept.get(owner, [])):
                if old.common(new.tokens) == len(old.tokens):
                    self._drop(owner, old)
            self._kept.setdefault(owner, []).append(new)
            self.bytes += new.bytes
            self._use(owner, new)
            while self.bytes > self.limit:
                longest_ago = next(iter(self._kept))
                self._drop(longest_ago, self._kept[longest_ago][0])

    def forget(self, key: Key) -> None:
        """Drop what was made with an adapter."""
        with self._lock:
            for owner in [owner for owner in self._kept if owner[1] == key]:
                for prefix in list(self._kept[owner]):
                    self._drop(owner, prefix)

    def _use(self, owner: Owner, prefix: Prefix) -> None:
        own = self._kept[owner]
        own.remove(prefix)
        own.append(prefix)
        self._kept.move_to_end(owner)

    def _drop(self, owner: Owner, prefix: Prefix) -> None:
        self._kept[owner].remove(prefix)
        self.bytes -= prefix.bytes
        if not self._kept[owner]:
            del self._kept[owner]
