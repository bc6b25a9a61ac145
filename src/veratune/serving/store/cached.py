"""CachedStore: another store, with the bytes of its versions cached on this machine."""

import contextlib
import time
from collections.abc import Iterable, Mapping

from veratune.errors import AdapterNotFoundError
from veratune.serving.store.base import Entry, Store, Version
from veratune.serving.store.sqlite import SqliteStore


class CachedStore(Store):
    """A SqliteStore in front of a slow store.

    A version never changes, so its bytes are read from the origin once. Which version is the newest
    is asked again after `refresh_seconds`, and at once after a put or delete through this store.
    """

    def __init__(
        self,
        origin: Store,
        cache: SqliteStore,
        refresh_seconds: float = 2.0,
        limit: int = 10 * 2**30,
    ) -> None:
        """Put a cache in front of a store.

        Args:
            origin: The store of record.
            cache: Keeps bytes on this machine.
            refresh_seconds: How long the newest version's number is trusted.
            limit: Bytes that the cache may hold.
        """
        self.origin, self.cache, self.limit = origin, cache, limit
        self.refresh_seconds = refresh_seconds
        self._newest: dict[tuple[str, str], tuple[float, Version]] = {}
        self._inserted = 0  # bytes since the last eviction

    def put(self, tenant: str, name: str, data: bytes) -> Version:
        version = self.origin.put(tenant, name, data)
        self._insert(tenant, name, version, data)
        self._newest[tenant, name] = (time.monotonic(), version)
        return version

    def newest(self, tenant: str, name: str) -> Version:
        cached = self._newest.get((tenant, name))
        if cached is not None and time.monotonic() - cached[0] < self.refresh_seconds:
            return cached[1]
        self._newest.pop((tenant, name), None)
        version = self.origin.newest(tenant, name)
        self._newest[tenant, name] = (time.monotonic(), version)
        return version

    def get(self, tenant: str, name: str, number: int) -> bytes:
        try:
            return self.cache.get(tenant, name, number)
        except AdapterNotFoundError:
            data = self.origin.get(tenant, name, number)
            self._insert(tenant, name, Version(number, len(data), time.time()), data)
            return data

    def versions(self, tenant: str, name: str) -> list[Version]:
        return self.origin.versions(tenant, name)

    def delete(self, tenant: str, name: str) -> Version:
        self._newest.pop((tenant, name), None)
        tombstone = self.origin.delete(tenant, name)
        with contextlib.suppress(AdapterNotFoundError):
            self.cache.delete(tenant, name)
        return tombstone

    def list_adapters(self, tenant: str, after: str = "", limit: int = 100) -> list[Entry]:
        return self.origin.list_adapters(tenant, after, limit)

    def put_embedding(self, tenant: str, name: str, data: bytes) -> None:
        self.origin.put_embedding(tenant, name, data)

    def list_embeddings(self, tenant: str) -> Mapping[str, str]:
        return self.origin.list_embeddings(tenant)

    def get_embeddings(self, tenant: str, names: Iterable[str]) -> Mapping[str, bytes]:
        return self.origin.get_embeddings(tenant, names)

    def roll_back(self, tenant: str, name: str, number: int) -> Version:
        # By the origin: the cache may still have a version that was deleted elsewhere.
        self._newest.pop((tenant, name), None)
        return self.origin.roll_back(tenant, name, number)

    def problem(self) -> str | None:
        return self.origin.problem() or self.cache.problem()

    def scrub(self) -> None:
        self.origin.scrub()
        self.cache.scrub()

    def close(self) -> None:
        self.origin.close()
        self.cache.close()

    def _insert(self, tenant: str, name: str, version: Version, data: bytes) -> None:
        self.cache.insert(tenant, name, version, data)
        self._inserted += len(data)
        # Summing all sizes is slow, so the cache may exceed its limit by an eighth.
        if self._inserted > self.limit // 8:
            self.cache.evict(self.limit)
            self._inserted = 0
