"""Adapter files of version 2: all d in one tensor, all b in another, and an index.

Tensors: `d`, `b` (1-D, the layers' vectors one after another, in the order of the index), and
`head/<name>`. int8 storage adds `d_scale` and `b_scale` (see `veratune.formats.int8`). Metadata:

    version   2
    config    every setting of VeraConfig; its patterns are a record and never evaluated on reading
    basis     fingerprint of A and B
    base      id and weights (the weight fingerprint: base64 of bfloat16) of the base model; where
              known, sample: [k, base64 of the base fingerprint's int8, k values for each matrix]
    layers    the index: [name, m, n, rank, *kernel] of each layer, in alphabetical order
    task      what the adapter is for: the task's name, its columns and labels
    digest    SHA-256 of the rest of this object and of every tensor's name, dtype, shape and bytes
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from veratune.adapter import Adapter
from veratune.errors import AdapterFileError
from veratune.formats.container import FLOAT_DTYPES, Header, TensorEntry, pack
from veratune.formats.contents import (
    Contents,
    Vectors,
    bad_entry,
    fingerprint_from_text,
    fingerprint_to_text,
    head_tensors,
    parse_config,
    sample_from_json,
    sample_to_json,
)
from veratune.formats.int8 import block_count, dequantize, quantize

VERSION = 2
Storage = Literal["float32", "bfloat16", "float16", "int8"]
_KEYS = {"version", "config", "basis", "base", "layers", "task", "digest"}


def encode(adapter: Adapter, storage: Storage | None = None) -> bytes:
    """An adapter as the bytes of a file of version 2.

    Args:
        adapter: The adapter.
        storage: The dtype of the vectors in the file. None: as they are. "int8" keeps the adapter's
            own dtype in its config, to which the vectors are converted on reading.

    Returns:
        The file's content. Equal adapters give equal bytes.
    """
    if storage is not None and storage != "int8":
        adapter = adapter.to(getattr(torch, storage))
    order = sorted(adapter.shapes)
    tensors: dict[str, Tensor] = {}
    for name, vectors in (("d", adapter.d), ("b", adapter.b)):
        if not vectors:
            continue
        flat = torch.cat([vectors[layer] for layer in order])
        if storage == "int8":
            tensors[name], tensors[f"{name}_scale"] = quantize(flat)
        else:
            tensors[name] = flat
    tensors |= {f"head/{name}": tensor for name, tensor in adapter.head.items()}
    metadata = {
        "version": VERSION,
        "config": adapter.config.to_dict(),
        "basis": adapter.fingerprint,
        "base": {
            "id": adapter.base_id,
            "weights": fingerprint_to_text(adapter.weight_fingerprint),
            **sample_to_json(adapter.base_fingerprint),
        },
        "layers": [
            [layer, *adapter.shapes[layer], adapter.ranks[layer], *adapter.kernels.get(layer, ())]
            for layer in order
        ],
        "task": dict(adapter.task),
    }
    return pack(metadata, tensors)


class Version2(Contents):
    """A header of version 2. Raises AdapterFileError or BasisError when it is not valid."""

    def __init__(self, header: Header) -> None:
        metadata = header.metadata
        self.lora_fingerprint = ""
        unknown = sorted(set(metadata) - _KEYS)
        if unknown:
            raise AdapterFileError(f"its metadata has the unknown entry {unknown[0]!r}")
        try:
            self.config = parse_config(metadata)
            index = [_index_entry(*entry) for entry in metadata["layers"]]
            self.base_id = str(metadata["base"]["id"])
            self.weight_fingerprint = fingerprint_from_text(metadata["base"]["weights"])
            self.base_fingerprint = sample_from_json(metadata["base"])
            fingerprint, self.task = str(metadata["basis"]), dict(metadata["task"])
        except AdapterFileError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise bad_entry(error) from None
        names = [name for name, *_ in index]
        if names != sorted(set(names)) or not names:
            raise AdapterFileError(
                "its index of layers is empty, out of order or has a layer twice"
            )
        self.shapes = {name: (m, n) for name, m, n, *_ in index}
        self.ranks = {name: rank for name, _, _, rank, _ in index}
        self.kernels = {name: kernel for name, *_, kernel in index if kernel}
        self.check_layers()
        self._entries = {entry.name: entry for entry in header.entries}
        trained = self.config.vectors
        self._sizes = {
            "d": list(self.ranks.values()) if trained != "b" else [],
            "b": [m for m, _ in self.shapes.values()] if trained != "d" else [],
        }
        for name, sizes in self._sizes.items():
            self._check_vectors(name, sum(sizes))
        known = {"d", "b", "d_scale", "b_scale"}
        for entry in header.entries:
            if entry.name not in known and not entry.name.startswith("head/"):
                raise AdapterFileError(f"tensor {entry.name!r} is neither d, b nor head/<name>")
        self.check_basis(fingerprint)

    def _check_vectors(self, name: str, size: int) -> None:
        """Raise AdapterFileError unless the tensor of all d or all b is as the index says."""
        entry, scale = self._entries.get(name), self._entries.get(f"{name}_scale")
        if entry is None or not size:
            if entry is None and not size and scale is None:
                return
            state = "is missing" if size else "is not expected"
            raise AdapterFileError(
                f"tensor '{name}' {state}; the config trains vectors={self.config.vectors!r}"
            )
        if entry.shape != (size,):
            raise AdapterFileError(
                f"tensor '{name}' is of shape {entry.shape}; the index of layers wants ({size},)"
            )
        if entry.dtype_name not in (*FLOAT_DTYPES, "I8"):
            raise AdapterFileError(
                f"tensor '{name}' is of dtype {entry.dtype_name}; one of "
                f"{', '.join(FLOAT_DTYPES)}, I8 is wanted"
            )
        wanted = (block_count(size),) if entry.dtype_name == "I8" else None
        found = None if scale is None else scale.shape
        if found != wanted or (scale is not None and scale.dtype_name != "BF16"):
            dtype = "" if scale is None else f" and dtype {scale.dtype_name}"
            raise AdapterFileError(
                f"tensor '{name}_scale' is of shape {found}{dtype}; {wanted} and BF16 are wanted "
                f"for '{name}' of dtype {entry.dtype_name}"
            )

    def vectors(self, body: bytearray) -> Vectors:
        d, b = (self._split(name, body) for name in ("d", "b"))
        head = head_tensors(
            (name, entry.tensor(body))
            for name, entry in self._entries.items()
            if name.startswith("head/")
        )
        return Vectors(d, b, head)

    def _split(self, name: str, body: bytearray) -> dict[str, Tensor]:
        sizes = self._sizes[name]
        if not sizes:
            return {}
        flat = _values(self._entries, name, body, getattr(torch, self.config.dtype))
        return dict(zip(self.shapes, flat.split(sizes), strict=True))


def _values(
    entries: Mapping[str, TensorEntry], name: str, body: bytearray, dtype: torch.dtype
) -> Tensor:
    """All d or all b of a file, dequantized."""
    flat = entries[name].tensor(body)
    if flat.dtype != torch.int8:
        return flat
    return dequantize(flat, entries[f"{name}_scale"].tensor(body)).to(dtype)


def _index_entry(
    name: Any, m: Any, n: Any, rank: Any, *kernel: Any
) -> tuple[str, int, int, int, tuple[int, ...]]:
    if not isinstance(name, str) or not name:
        raise ValueError(f"the index names a layer {name!r}")
    return name, int(m), int(n), int(rank), tuple(map(int, kernel))
