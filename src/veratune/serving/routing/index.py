"""RoutingIndex: the embeddings of each tenant's adapters, as one matrix in memory."""

import dataclasses
import logging
import threading
import time
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from veratune.errors import AdapterStateError, StoreError
from veratune.lru import ByteLRU
from veratune.serving.routing.adapter_embedding import AdapterEmbedding
from veratune.serving.routing.embedder import Embedder
from veratune.serving.store.base import Store

log = logging.getLogger(__name__)
_MAX_BYTES = 256 * 2**20
_NO_TAGS: Mapping[str, str] = {}


@dataclasses.dataclass(frozen=True)
class TenantIndex:
    """The embeddings of a tenant's adapters.

    Attributes:
        tags: Name -> the tag of its embedding in the store.
        embeddings: Name -> embedding, of those that this server's embedding model made.
        names: Name of each row's adapter.
        matrix: All centroids, shape (rows, width).
        thresholds: Of each row's adapter.
        embedder: The id of this server's embedding model.
        checked: When the store was asked last, in seconds of `time.monotonic`.
    """

    tags: Mapping[str, str]
    embeddings: Mapping[str, AdapterEmbedding]
    names: tuple[str, ...]
    matrix: NDArray[np.float32]
    thresholds: NDArray[np.float32]
    embedder: str
    checked: float

    @classmethod
    def of(
        cls, tags: Mapping[str, str], embeddings: Mapping[str, AdapterEmbedding], embedder: str
    ) -> "TenantIndex":
        """Stack the embeddings."""
        rows = [(name, e, row) for name, e in embeddings.items() for row in e.centroids]
        return cls(
            tags,
            embeddings,
            tuple(name for name, _, _ in rows),
            np.stack([row for *_, row in rows]) if rows else np.empty((0, 1), np.float32),
            np.array([e.threshold for _, e, _ in rows], np.float32),
            embedder,
            time.monotonic(),
        )

    @property
    def size(self) -> int:
        """Bytes in memory, about."""
        return 2 * self.matrix.nbytes + 300 * len(self.tags) + 1000

    def check_current(self) -> None:
        """Raise AdapterStateError if other models made all embeddings of the tenant."""
        if self.tags and not self.names:
            raise AdapterStateError(
                f"the examples of this tenant's {len(self.tags)} adapters were embedded by another "
                f"model than {self.embedder}, by which this server chooses; send them again "
                "(PUT /v1/adapters/NAME/examples)"
            )

    def nearest(self, vector: NDArray[np.float32], without: Collection[str] = ()) -> str | None:
        """The adapter of the nearest centroid by cosine.

        Args:
            vector: Of an input, shape (width,), length 1.
            without: Adapters that are passed over.

        Returns:
            The adapter's name; None if the input is below its threshold.
        """
        if not self.names:
            return None
        cosines = self.matrix @ vector
        if without:
            cosines[[name in without for name in self.names]] = -np.inf
        best = int(cosines.argmax())
        return self.names[best] if cosines[best] >= self.thresholds[best] else None

    def first_near(
        self, vectors: Iterable[NDArray[np.float32]], without: Collection[str] = ()
    ) -> str | None:
        """The nearest adapter of the first input that is near to any; else None."""
        names = (self.nearest(vector, without) for vector in vectors)
        return next((name for name in names if name is not None), None)


class RoutingIndex:
    """The indexes of the tenants that were used last. Methods may be called from any thread.

    Args:
        store: Has the embeddings.
        embedder: This server's embedding model; embeddings of others are not used.
        refresh_seconds: How long an index is used before the store is asked for changes.
    """

    def __init__(self, store: Store, embedder: Embedder, refresh_seconds: float = 2.0) -> None:
        self.store, self.embedder, self.refresh_seconds = store, embedder, refresh_seconds
        self._indexes: ByteLRU[str, TenantIndex] = ByteLRU(_MAX_BYTES)
        self._lock = threading.Lock()
        self._warned: set[tuple[str, str]] = set()

    def get(self, tenant: str) -> TenantIndex:
        """A tenant's index. Raises StoreError."""
        with self._lock:
            known = self._indexes.get(tenant)
        if known is not None and time.monotonic() - known.checked < self.refresh_seconds:
            return known
        tags = self.store.list_embeddings(tenant)
        if known is not None and known.tags == tags:
            found = dataclasses.replace(known, checked=time.monotonic())
        else:
            found = self._read(tenant, tags, known)
        with self._lock:
            self._indexes.put(tenant, found, found.size)
        return found

    def forget(self, tenant: str) -> None:
        """Ask the store at the next use."""
        with self._lock:
            self._indexes.pop(tenant)

    def _read(self, tenant: str, tags: Mapping[str, str], known: TenantIndex | None) -> TenantIndex:
        """Read what has changed."""
        old = known.tags if known is not None else _NO_TAGS
        changed = [name for name, tag in tags.items() if old.get(name) != tag]
        data = self.store.get_embeddings(tenant, changed)
        embeddings: dict[str, AdapterEmbedding] = {}
        for name, tag in tags.items():
            if known is not None and old.get(name) == tag:
                if name in known.embeddings:
                    embeddings[name] = known.embeddings[name]
            elif name in data:
                found = self._decode(tenant, name, data[name])
                if found is not None:
                    embeddings[name] = found
        return TenantIndex.of(tags, embeddings, self.embedder.id)

    def _decode(self, tenant: str, name: str, data: bytes) -> AdapterEmbedding | None:
        """An embedding that can be used here; None, with a line in the log, for others."""
        try:
            found = AdapterEmbedding.decode(data)
        except StoreError as error:
            log.error("adapter %s of %s is not chosen for auto: %s", name, tenant, error)
            return None
        if found.embedder == self.embedder.id and found.centroids.shape[1] == self.embedder.width:
            return found
        self._warn(tenant, name, found.embedder)
        return None

    def _warn(self, tenant: str, name: str, embedder: str) -> None:
        if (tenant, name) not in self._warned and len(self._warned) < 1000:
            self._warned.add((tenant, name))
            log.warning(
                "adapter %s of %s is not chosen for auto: its examples were embedded by %s, and "
                "this server embeds by %s; send them again",
                name,
                tenant,
                embedder,
                self.embedder.id,
            )
