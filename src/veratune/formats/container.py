"""The container of an adapter file: safetensors, one JSON metadata entry, and a digest of both.

Nothing here knows what the entry or the tensors mean. Equal content gives equal bytes.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from veratune.errors import AdapterFileError

METADATA_ENTRY = "veratune"
FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = FLOAT_DTYPES | {
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What safetensors and json raise for bytes that are no whole file.
UNREADABLE = (safetensors.SafetensorError, ValueError, KeyError, RecursionError, OverflowError)
# The metadata entry is JSON text inside the header's JSON, so its quotes are escaped.
_DIGEST = re.compile(rb'\\"digest\\":\\"([0-9a-f]{64})\\"')


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file: name, dtype, shape, and its bytes start..stop of the body."""

    name: str
    dtype: torch.dtype
    dtype_name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def tensor(self, body: bytearray) -> Tensor:
        """The tensor as a view of the body."""
        if self.start == self.stop:
            return torch.empty(self.shape, dtype=self.dtype)
        count = (self.stop - self.start) // self.dtype.itemsize
        flat = torch.frombuffer(body, dtype=self.dtype, offset=self.start, count=count)
        return flat if len(self.shape) == 1 else flat.view(self.shape)


class Header:
    """A file's header: the metadata entry and where each tensor lies, in the order of their names.

    Attributes:
        metadata: The JSON object under "veratune".
        entries: The tensors.
        body_size: Bytes of all tensors.
    """

    def __init__(self, header: Mapping[str, Any], body_size: int) -> None:
        self.metadata = _metadata(header)
        self.body_size = body_size
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        unknown = sorted({entry["dtype"] for entry in tensors.values()} - set(DTYPES))
        if unknown:
            raise AdapterFileError(
                f"it has tensors of dtype {', '.join(unknown)}; {', '.join(DTYPES)} are known"
            )
        self.entries = [
            TensorEntry(
                name,
                DTYPES[entry["dtype"]],
                entry["dtype"],
                tuple(entry["shape"]),
                *entry["data_offsets"],
            )
            for name, entry in sorted(tensors.items())
        ]
        described = {key: value for key, value in self.metadata.items() if key != "digest"}
        self._start = hashlib.sha256(_canonical_bytes(described))
        self._labels = [_label(e.name, e.dtype, e.shape) for e in self.entries]

    def digest_of(self, body: memoryview) -> str:
        """The digest that a file with this header and this body must carry."""
        contents = [body[entry.start : entry.stop] for entry in self.entries]
        return _digest(self._start, self._labels, contents)


def split_header(data: bytes) -> tuple[bytes, str, memoryview]:
    """The header without its digest, the digest, and the body of a file, nothing checked.

    The first two are empty where no digest is written as `pack` writes it.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = data[8:start]
    body = memoryview(data)[start:]
    match = _DIGEST.search(header)
    if match is None:
        return b"", "", body
    return header[: match.start(1)] + header[match.end(1) :], match[1].decode(), body


def parse_header(data: bytes) -> Header:
    """Parse and check a file's container. Raises AdapterFileError."""
    try:
        safetensors.deserialize(data)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
    except UNREADABLE as error:
        raise AdapterFileError(f"not a whole safetensors file ({error}); was it cut off?") from None
    return Header(header, len(data) - 8 - size)


def pack(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """A file of these metadata, the digest added, and these tensors sorted by name."""
    ordered = {name: tensors[name].contiguous() for name in sorted(tensors)}
    labels = [_label(name, t.dtype, tuple(t.shape)) for name, t in ordered.items()]
    contents = [t.reshape(-1).view(torch.uint8).numpy().data for t in ordered.values()]
    digest = _digest(hashlib.sha256(_canonical_bytes(metadata)), labels, contents)
    text = _canonical({**metadata, "digest": digest})
    return safetensors.torch.save(ordered, {METADATA_ENTRY: text})


def _metadata(header: Any) -> dict[str, Any]:
    entries = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    text = entries.get(METADATA_ENTRY)
    if not isinstance(text, str):
        raise AdapterFileError(
            "a safetensors file, but not a veratune adapter: it has no 'veratune' metadata"
        )
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"its metadata is not JSON ({error})") from None
    return metadata if isinstance(metadata, dict) else {}


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _canonical_bytes(metadata: Mapping[str, Any]) -> bytes:
    return _canonical(metadata).encode("utf-8", "surrogatepass")


def _digest(start: "hashlib._Hash", labels: Sequence[bytes], contents: Iterable[memoryview]) -> str:
    """SHA-256 of the metadata, hashed already, and of each tensor's label and bytes."""
    digest = start.copy()
    for label, content in zip(labels, contents, strict=True):
        digest.update(label)
        digest.update(content)
    return digest.hexdigest()


def _label(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    return f"\0{name}\0{dtype}\0{list(shape)}\0".encode("utf-8", "surrogatepass")
