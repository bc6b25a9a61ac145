"""ObjectStore: adapters in a bucket or folder, through obstore: s3://, gs://, az://, file://."""

import concurrent.futures
import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from veratune.errors import AdapterFileError, AdapterNotFoundError, StoreError
from veratune.serving.store.base import Entry, Store, Version, check_name, check_names

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Backend

_LAST = 99_999_999  # object keys count down from it, so that the newest version is listed first
_EMBEDDINGS = "_embeddings"  # no tenant's name begins with an underscore
_READERS = 16  # embeddings that are read at once


class ObjectStore(Store):
    """Adapters in a bucket; every version is an object that is written once.

    Keys are TENANT/NAME/NUMBER with numbers that count down, so that the newest version comes
    first in a listing. Two machines that put at the same time get two versions: an object is
    created or not, never replaced. Embeddings are at _embeddings/TENANT/NAME.
    """

    def __init__(self, store: "Backend") -> None:
        """Wrap an obstore store, such as obstore.store.from_url("s3://bucket/adapters")."""
        self.store = store

    @classmethod
    def from_url(cls, url: str, **options: str) -> "ObjectStore":
        """Open a store at a URL.

        Args:
            url: Such as s3://bucket/adapters.
            **options: Credentials and settings, as obstore takes them.

        Raises:
            StoreError: The URL names no object store.
        """
        import obstore.store

        try:
            return cls(obstore.store.from_url(url, **options))  # type: ignore[call-overload]
        except Exception as error:  # obstore raises errors of many classes
            raise StoreError(
                f"{url}: no object store: {' '.join(str(error).split())[:200]}"
            ) from error

    def put(self, tenant: str, name: str, data: bytes) -> Version:
        if not data:
            raise AdapterFileError(f"adapter {name!r} of {tenant!r} has no bytes")
        return self._append(tenant, name, data)

    def newest(self, tenant: str, name: str) -> Version:
        history = self._history(tenant, name)
        if not history or not history[0].size:
            raise AdapterNotFoundError(f"no adapter {name!r}")
        return history[0]

    def get(self, tenant: str, name: str, number: int) -> bytes:
        import obstore

        check_names(tenant, name)
        try:
            with _as_store_error("read"):
                data = bytes(obstore.get(self.store, _key(tenant, name, number)).bytes())
        except FileNotFoundError:
            data = b""
        if not data:
            raise AdapterNotFoundError(f"no version {number} of adapter {name!r}")
        return data

    def versions(self, tenant: str, name: str) -> list[Version]:
        history = self._history(tenant, name)
        if not history:
            raise AdapterNotFoundError(f"no adapter {name!r}")
        return history

    def delete(self, tenant: str, name: str) -> Version:
        import obstore

        self.newest(tenant, name)
        tombstone = self._append(tenant, name, b"")
        older = [v.number for v in self._history(tenant, name) if v.number < tombstone.number]
        with _as_store_error("delete"):
            obstore.delete(self.store, [_key(tenant, name, number) for number in older])
        self._delete_embedding(tenant, name)
        return tombstone

    def list_adapters(self, tenant: str, after: str = "", limit: int = 100) -> list[Entry]:
        import obstore

        check_name("tenant", tenant)
        with _as_store_error("list"):
            folders = obstore.list_with_delimiter(self.store, tenant)["common_prefixes"]
        entries: list[Entry] = []
        for name in sorted(path.rpartition("/")[2] for path in folders):
            if name > after and len(entries) < limit:
                newest = self._history(tenant, name)[:1]
                entries += [Entry(name, version) for version in newest if version.size]
        return entries

    def put_embedding(self, tenant: str, name: str, data: bytes) -> None:
        import obstore

        self.newest(tenant, name)
        with _as_store_error("write"):
            obstore.put(self.store, f"{_EMBEDDINGS}/{tenant}/{name}", data)
        try:
            self.newest(tenant, name)
        except AdapterNotFoundError:  # it was deleted meanwhile
            self._delete_embedding(tenant, name)
            raise

    def list_embeddings(self, tenant: str) -> Mapping[str, str]:
        import obstore

        check_name("tenant", tenant)
        with _as_store_error("list"):
            return {
                str(entry["path"]).rpartition("/")[2]: f"{entry['e_tag']} {entry['last_modified']}"
                for page in obstore.list(self.store, f"{_EMBEDDINGS}/{tenant}")
                for entry in page
            }

    def get_embeddings(self, tenant: str, names: Iterable[str]) -> Mapping[str, bytes]:
        import obstore

        check_name("tenant", tenant)

        def read(name: str) -> bytes | None:
            check_name("adapter name", name)
            try:
                with _as_store_error("read"):
                    key = f"{_EMBEDDINGS}/{tenant}/{name}"
                    return bytes(obstore.get(self.store, key).bytes())
            except FileNotFoundError:
                return None

        wanted = list(names)
        with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
            found = dict(zip(wanted, readers.map(read, wanted), strict=True))
        return {name: data for name, data in found.items() if data is not None}

    def _delete_embedding(self, tenant: str, name: str) -> None:
        import obstore

        with contextlib.suppress(FileNotFoundError), _as_store_error("delete"):
            obstore.delete(self.store, f"{_EMBEDDINGS}/{tenant}/{name}")

    def _history(self, tenant: str, name: str) -> list[Version]:
        import obstore

        check_names(tenant, name)
        with _as_store_error("list"):
            objects = [
                entry for page in obstore.list(self.store, f"{tenant}/{name}") for entry in page
            ]
        history = [
            Version(
                _LAST - int(str(entry["path"]).rpartition("/")[2]),
                entry["size"],
                entry["last_modified"].timestamp(),
            )
            for entry in objects
        ]
        return sorted(history, key=lambda version: -version.number)

    def _append(self, tenant: str, name: str, data: bytes) -> Version:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        while True:
            number = max((version.number for version in self._history(tenant, name)), default=0) + 1
            try:
                with _as_store_error("write"):
                    obstore.put(self.store, _key(tenant, name, number), data, mode="create")
            except AlreadyExistsError:  # another machine took this number
                continue
            return Version(number, len(data), time.time())


@contextlib.contextmanager
def _as_store_error(action: str) -> Iterator[None]:
    """Obstore's errors as StoreError, except those that callers handle."""
    from obstore.exceptions import AlreadyExistsError, BaseError

    try:
        yield
    except (AlreadyExistsError, FileNotFoundError):
        raise
    except (BaseError, OSError) as error:
        raise StoreError(
            f"the object store could not {action}: {' '.join(str(error).split())[:200]}"
        ) from error


def _key(tenant: str, name: str, number: int) -> str:
    return f"{tenant}/{name}/{_LAST - number:08d}"
