"""veratune's own file: one safetensors file an adapter.

Version 2 is written (see `veratune.formats.version2`); version 1 is read for ever. Reading trusts
nothing: see `AdapterReader.decode`.
"""

import threading
from collections.abc import Callable
from pathlib import Path

from veratune.adapter import Adapter
from veratune.errors import AdapterFileError
from veratune.formats import version1, version2
from veratune.formats.atomic import write_atomic
from veratune.formats.container import Header, parse_header, split_header
from veratune.formats.contents import Contents
from veratune.formats.version1 import Version1
from veratune.formats.version2 import Storage, Version2, encode

__all__ = ["SUFFIX", "AdapterReader", "Storage", "decode", "digest_of", "encode", "read", "write"]

SUFFIX = ".safetensors"
_MAX_FILE_BYTES = 2**34  # an adapter with a trained head may be large; beyond this it is a mistake
_MAX_CACHED_HEADER = 2**20  # bytes of a header that AdapterReader keeps
_VERSIONS: dict[int, Callable[[Header], Contents]] = {
    version1.VERSION: Version1,
    version2.VERSION: Version2,
}


def write(adapter: Adapter, path: str | Path, storage: Storage | None = None) -> int:
    """Write an adapter's file atomically.

    Args:
        adapter: The adapter.
        path: The file.
        storage: The dtype of the vectors in the file; None: as they are.

    Returns:
        The file's size in bytes.

    Raises:
        OutputError: The file cannot be written; a previous file is unchanged.
    """
    data = encode(adapter, storage)
    write_atomic(Path(path), data)
    return len(data)


def read(path: str | Path) -> Adapter:
    """Read and check an adapter's file. Raises AdapterFileError naming the file and the reason."""
    try:
        return decode(read_bytes(path))
    except AdapterFileError as error:
        raise type(error)(f"{path}: {error}") from error


def read_bytes(path: str | Path) -> bytes:
    """A file's content, its size bounded. Raises AdapterFileError."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise AdapterFileError(
                f"it has {size:,} bytes; an adapter has at most {_MAX_FILE_BYTES:,}"
            )
        return path.read_bytes()
    except OSError as error:
        raise AdapterFileError(f"cannot be read: {error.strerror or error}") from error


def decode(data: bytes) -> Adapter:
    """The adapter in a file's bytes: see `AdapterReader.decode`."""
    return AdapterReader(max_headers=0).decode(data)


def digest_of(data: bytes) -> str:
    """The digest that a file carries; `decode` checks it. Raises AdapterFileError."""
    return str(parse_header(data).metadata.get("digest"))


class AdapterReader:
    """Decodes many files; the headers of files that differ in their tensors alone are checked once.

    Args:
        max_headers: How many headers are kept. 0 keeps none.
    """

    def __init__(self, max_headers: int = 64) -> None:
        self._max_headers = max_headers
        self._headers: dict[bytes, tuple[Header, Contents]] = {}
        self._lock = threading.Lock()

    def decode(self, data: bytes) -> Adapter:
        """Decode an adapter's file.

        Checked, in this order: the container (sizes, offsets, overlaps), the metadata's form and
        version, the digest, the settings, every tensor's name, dtype, shape and finiteness, the
        basis' fingerprint.

        Args:
            data: The file's content.

        Returns:
            The adapter; its tensors are copies.

        Raises:
            AdapterFileError: The file is damaged, tampered with or of a newer version.
            BasisError: A and B as drawn here are not those of the file.
        """
        key, digest, body = split_header(data)
        cached = self._headers.get(key) if key else None
        if cached is not None and len(body) == cached[0].body_size:
            header, contents = cached
            _check_digest(header, body, digest)
            return contents.adapter(body)
        header = parse_header(data)
        version = header.metadata.get("version")
        kind = _VERSIONS.get(version) if type(version) is int else None
        if kind is None:
            raise AdapterFileError(
                f"its format version is {version!r}; this veratune reads versions "
                f"{' and '.join(map(str, _VERSIONS))}"
            )
        _check_digest(header, body, str(header.metadata.get("digest")))
        contents = kind(header)
        adapter = contents.adapter(body)
        self._keep(key, header, contents)
        return adapter

    def _keep(self, key: bytes, header: Header, contents: Contents) -> None:
        if key and len(key) <= _MAX_CACHED_HEADER and self._max_headers:
            with self._lock:
                self._headers[key] = (header, contents)
                if len(self._headers) > self._max_headers:
                    del self._headers[next(iter(self._headers))]


def _check_digest(header: Header, body: memoryview, digest: str) -> None:
    if header.digest_of(body) != digest:
        raise AdapterFileError(
            "its content does not match its digest: it was damaged or tampered with"
        )
