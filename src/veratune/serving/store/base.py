"""The interface of adapter stores: adapters of all tenants, as bytes in numbered versions.

    Store (abstract)
    ├── SqliteStore    one file on this machine
    ├── ObjectStore    a bucket or folder through obstore, shared by many machines
    └── CachedStore    a SqliteStore as cache in front of a slow store

A history only grows: `put` appends a version, `roll_back` appends an old version's bytes again, and
`delete` appends a tombstone. Version numbers are never reused, so a name that was deleted and
uploaded again never serves its old bytes.
"""

import abc
import dataclasses
import re
from collections.abc import Iterable, Mapping

from veratune.errors import InvalidNameError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclasses.dataclass(frozen=True)
class Version:
    """One version of an adapter.

    Attributes:
        number: Counts from 1.
        size: Bytes; 0 for a tombstone.
        created: Seconds since 1970.
    """

    number: int
    size: int
    created: float


@dataclasses.dataclass(frozen=True)
class Entry:
    """An adapter in a listing.

    Attributes:
        name: The adapter's name.
        version: Its newest version.
    """

    name: str
    version: Version


class Store(abc.ABC):
    """Adapters by tenant and name.

    Methods may be called from any thread. All of them raise InvalidNameError for an invalid name
    and StoreError when the store cannot be reached. What `put` returned for survives a crash.
    """

    @abc.abstractmethod
    def put(self, tenant: str, name: str, data: bytes) -> Version:
        """Append a version. Raises AdapterFileError if `data` is empty."""

    @abc.abstractmethod
    def newest(self, tenant: str, name: str) -> Version:
        """The current version. Raises AdapterNotFoundError."""

    @abc.abstractmethod
    def get(self, tenant: str, name: str, number: int) -> bytes:
        """The bytes of one version. Raises AdapterNotFoundError, also for a deleted version."""

    @abc.abstractmethod
    def versions(self, tenant: str, name: str) -> list[Version]:
        """All versions, newest first, tombstones included. Raises AdapterNotFoundError."""

    @abc.abstractmethod
    def delete(self, tenant: str, name: str) -> Version:
        """Append a tombstone and drop the bytes of all versions. Raises AdapterNotFoundError."""

    @abc.abstractmethod
    def list_adapters(self, tenant: str, after: str = "", limit: int = 100) -> list[Entry]:
        """A tenant's adapters by name, deleted ones left out.

        Args:
            tenant: Whose adapters.
            after: List only names after this one.
            limit: The most entries.
        """

    @abc.abstractmethod
    def put_embedding(self, tenant: str, name: str, data: bytes) -> None:
        """Store the embedding of an adapter's inputs (`AdapterEmbedding.encode`), one a name.

        It stays when a new version is put, and goes when the adapter is deleted.

        Raises:
            AdapterNotFoundError: There is no such adapter.
        """

    @abc.abstractmethod
    def list_embeddings(self, tenant: str) -> Mapping[str, str]:
        """Name -> tag of a tenant's embeddings; a tag changes when its embedding is replaced."""

    @abc.abstractmethod
    def get_embeddings(self, tenant: str, names: Iterable[str]) -> Mapping[str, bytes]:
        """Name -> bytes of a tenant's embeddings; names without one are left out."""

    def roll_back(self, tenant: str, name: str, number: int) -> Version:
        """Append an old version's bytes as the newest version. Raises AdapterNotFoundError."""
        return self.put(tenant, name, self.get(tenant, name, number))

    def scrub(self) -> None:  # noqa: B027 (a bucket keeps no deleted bytes that it could remove)
        """Overwrite deleted bytes on disk. Raises StoreError if that is not possible now."""

    def problem(self) -> str | None:
        """The reason why the store cannot take adapters now; None if it can."""
        self.list_adapters("default", limit=1)
        return None

    def close(self) -> None:  # noqa: B027 (some stores have nothing to close)
        """Release connections."""


def check_name(what: str, name: str) -> None:
    """Check the name of a tenant or an adapter.

    Args:
        what: What is named, for the error.
        name: The name.

    Raises:
        InvalidNameError: The name has other characters than letters, digits, dots, dashes and
            underscores, is empty, or is longer than 128 characters.
    """
    if not _NAME.fullmatch(name):
        shown = name if len(name) <= 40 else f"{name[:40]}..."
        raise InvalidNameError(
            f"{what} {shown!r} cannot be used: 1 to 128 letters, digits, dots, dashes and "
            "underscores are wanted, a letter or digit first"
        )


def check_names(tenant: str, name: str) -> None:
    """Check a tenant's and an adapter's name. Raises InvalidNameError."""
    check_name("tenant", tenant)
    check_name("adapter name", name)
