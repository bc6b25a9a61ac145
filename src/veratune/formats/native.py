"""veratune's own file: one safetensors file an adapter.

Tensors: `d/<layer>`, `b/<layer>`, and `head/<name>` when a head was trained. Metadata: one entry,
`veratune`, a JSON object of

    version   1
    config    every setting of VeraConfig
    basis     fingerprint of the frozen matrices
    base      id and probe (base64 of bfloat16) of the base model
    shapes    [m, n] of each layer, layers in alphabetical order
    kernels   sizes of the kernels by layer, where there are convolutions
    task      what the adapter is for: the task's name, its columns and labels
    digest    SHA-256 of the rest of this object and of every tensor's name, dtype, shape and bytes

Equal adapters give equal bytes. Reading trusts nothing: see `decode`.
"""

import base64
import binascii
import copy
import dataclasses
import functools
import hashlib
import json
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from veratune.adapter import FINGERPRINT_VALUES, Adapter
from veratune.basis.basis import basis_of
from veratune.config import VeraConfig
from veratune.errors import AdapterFileError, BasisError, VeratuneError
from veratune.formats.atomic import write_atomic

VERSION = 1
SUFFIX = ".safetensors"
_ENTRY = "veratune"
_LARGEST = 2**34  # bytes; an adapter with a trained head may be large, one beyond this is a mistake
_LARGEST_BASIS = (
    2**31
)  # values; what a file may make this machine draw before its layers were compared with a model's
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = _FLOATS | {
    "F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_DIGEST = re.compile(rb'\\"digest\\":\\"([0-9a-f]{64})\\"')  # inside a JSON text inside JSON


def write(adapter: Adapter, path: str | Path) -> int:
    """Write an adapter's file, whole or not at all. Returns its size in bytes. Raises OutputError."""
    data = encode(adapter)
    write_atomic(Path(path), data)
    return len(data)


def read(path: str | Path) -> Adapter:
    """Read and check an adapter's file. Raises AdapterFileError naming the file and the reason."""
    path = Path(path)
    try:
        if path.stat().st_size > _LARGEST:
            raise AdapterFileError(
                f"it has {path.stat().st_size:,} bytes; an adapter has at most {_LARGEST:,}"
            )
        return decode(path.read_bytes())
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except AdapterFileError as error:
        raise type(error)(f"{path}: {error}") from error


def encode(adapter: Adapter) -> bytes:
    """An adapter as the bytes of its file."""
    tensors = {f"d/{k}": v for k, v in adapter.d.items()} | {
        f"b/{k}": v for k, v in adapter.b.items()
    }
    tensors |= {f"head/{k}": v for k, v in adapter.head.items()}
    tensors = {name: tensors[name].contiguous() for name in sorted(tensors)}
    about = {
        "version": VERSION,
        "config": adapter.config.to_dict(),
        "basis": adapter.fingerprint,
        "base": {"id": adapter.base_id, "probe": _to_text(adapter.weight_fingerprint)},
        "shapes": [list(adapter.shapes[layer]) for layer in sorted(adapter.shapes)],
        "task": dict(adapter.task),
    }
    if adapter.kernels:
        about["kernels"] = {layer: list(kernel) for layer, kernel in adapter.kernels.items()}
    return _pack(about, tensors)


def decode(data: bytes) -> Adapter:
    """The adapter in a file's bytes.

    Checked, in this order: the container (sizes, offsets, overlaps), the metadata's form and version, the
    digest, the settings, every tensor's name, dtype, shape and finiteness, the basis' fingerprint. What the header alone says is checked
    once for all files that have it in common, the digest apart.
    Raises AdapterFileError, or BasisError where the matrices made here would be others.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header, digest = _without_digest(data[8:start])
    layout = _LAYOUTS.get(header)
    if layout is None or len(data) - start != layout.size:
        layout = _layout(data)
        digest = str(layout.about.get("digest"))
    body = memoryview(data)[start:]
    if layout.digest_of(body) != digest:
        raise AdapterFileError(
            "its content does not match its digest: it was damaged or tampered with"
        )
    adapter = layout.meaning.adapter(layout, body)
    if header and len(header) <= _LARGEST_LAYOUT:
        with _LOCK:
            _LAYOUTS[header] = layout
            if len(_LAYOUTS) > _LAYOUTS_KEPT:
                del _LAYOUTS[next(iter(_LAYOUTS))]
    return adapter


@dataclasses.dataclass(frozen=True)
class _Meaning:
    """What a file's metadata say, checked."""

    config: VeraConfig
    shapes: dict[str, tuple[int, int]]
    base_id: str
    weight_fingerprint: Tensor | None
    task: dict[str, Any]
    kernels: dict[str, tuple[int, ...]]
    lora_fingerprint: str

    def adapter(self, layout: "_Layout", body: memoryview) -> Adapter:
        """The adapter with the tensors of one file."""
        found: dict[str, dict[str, Tensor]] = {"d": {}, "b": {}, "head": {}}
        memory = bytearray(body)  # that the tensors may be written to
        for (kind, layer), (dtype, shape, first, last) in zip(
            layout.names, layout.tensors.values(), strict=True
        ):
            if last == first:
                found[kind][layer] = torch.empty(shape, dtype=dtype)
                continue
            flat = torch.frombuffer(
                memory, dtype=dtype, offset=first, count=(last - first) // dtype.itemsize
            )
            found[kind][layer] = flat if len(shape) == 1 else flat.view(shape)
        return Adapter(
            self.config, dict(self.shapes), found["d"], found["b"], found["head"], self.base_id, self.weight_fingerprint, copy.deepcopy(self.task),
            dict(self.kernels), self.lora_fingerprint,
        )  # fmt: skip


class _Layout:
    """A file's header: what it says, and where its tensors are, by name: dtype, shape, first byte and the byte after the last."""

    def __init__(self, header: dict[str, Any], size: int) -> None:
        self.about, self.size = _about(header), size
        self.dtypes = {
            name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"
        }
        unknown = sorted(set(self.dtypes.values()) - set(_DTYPES))
        if unknown:
            raise AdapterFileError(
                f"it has tensors of dtype {', '.join(unknown)}; {', '.join(_DTYPES)} are known"
            )
        self.tensors = {
            name: (_DTYPES[entry["dtype"]], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in sorted(header.items())
            if name != "__metadata__"
        }
        self.names = [
            (kind, layer) for kind, _, layer in (name.partition("/") for name in self.tensors)
        ]
        self._start = hashlib.sha256(
            _text_of({k: v for k, v in self.about.items() if k != "digest"})
        )
        self._labels = [
            _label(name, dtype, shape) for name, (dtype, shape, _, _) in self.tensors.items()
        ]

    def digest_of(self, body: memoryview) -> str:
        """The digest of a file with this header."""
        return _digest(
            self._start,
            self._labels,
            [body[first:last] for _, _, first, last in self.tensors.values()],
        )

    @functools.cached_property
    def meaning(self) -> _Meaning:
        about = self.about
        try:
            config = VeraConfig.from_dict(about["config"])
            shapes = [(int(m), int(n)) for m, n in about["shapes"]]
            base_id, weight_fingerprint = (
                str(about["base"]["id"]),
                _from_text(about["base"]["probe"]),
            )
            fingerprint, task = str(about["basis"]), dict(about["task"])
            kernels = {
                layer: tuple(map(int, kernel)) for layer, kernel in about.get("kernels", {}).items()
            }
        except VeratuneError as error:
            raise AdapterFileError(f"its configuration is not valid: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AdapterFileError(
                f"its metadata lacks or garbles an entry ({type(error).__name__}: {error})"
            ) from None
        layers: set[str] = set()
        for (name, (dtype, *_)), (kind, layer) in zip(
            self.tensors.items(), self.names, strict=True
        ):
            if kind not in ("d", "b", "head") or not layer:
                raise AdapterFileError(
                    f"tensor {name!r} is neither d/<layer>, b/<layer> nor head/<name>"
                )
            if kind != "head" and dtype not in _FLOATS.values():
                raise AdapterFileError(
                    f"tensor {name!r} is of dtype {self.dtypes[name]}; one of {', '.join(_FLOATS)} is wanted"
                )
            if kind != "head":
                layers.add(layer)
        if len(layers) != len(shapes):
            raise AdapterFileError(
                f"it has vectors for {len(layers)} layers and shapes for {len(shapes)}"
            )
        by_layer = dict(zip(sorted(layers), shapes, strict=True))
        for layer, (m, n) in by_layer.items():
            if m < 1 or n < 1 or max(m, n) * config.rank > _LARGEST_BASIS:
                raise AdapterFileError(
                    f"layer '{layer}' claims the size {n} -> {m} at rank {config.rank}, which no layer has"
                )
        for layer, kernel in kernels.items():
            if layer not in by_layer or not 1 <= len(kernel) <= 3 or min(kernel) < 1:
                raise AdapterFileError(
                    f"it says that layer '{layer}' has a kernel of {list(kernel)}, which no convolution of its layers has"
                )
        lora_fingerprint = (
            fingerprint if config.basis == "lora" else ""
        )  # compared with the LoRA when the adapter goes into a model
        if not lora_fingerprint and basis_of(config, by_layer).fingerprint() != fingerprint:
            raise BasisError(
                f"the basis drawn here (seed {config.seed}, basis={config.basis!r}) is not the one the adapter was trained "
                "with: its fingerprint differs. The file is of another version, or was changed"
            )
        return _Meaning(
            config, by_layer, base_id, weight_fingerprint, task, kernels, lora_fingerprint
        )


_LAYOUTS: dict[bytes, _Layout] = {}  # of files that were read lately, by header without its digest
_LAYOUTS_KEPT, _LARGEST_LAYOUT = 64, 2**20
_LOCK = threading.Lock()  # held by who changes _LAYOUTS


def _without_digest(header: bytes) -> tuple[bytes, str]:
    """A header with its digest cut out, and the digest; nothing and "" where it is not found as `encode` writes it."""
    found = _DIGEST.search(header)
    return (
        (header[: found.start(1)] + header[found.end(1) :], found[1].decode())
        if found
        else (b"", "")
    )


def _layout(data: bytes) -> _Layout:
    """The layout of a file, its container checked."""
    try:
        safetensors.deserialize(data)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
    except (
        safetensors.SafetensorError,
        ValueError,
        KeyError,
        RecursionError,
        OverflowError,
    ) as error:
        raise AdapterFileError(f"not a whole safetensors file ({error}); was it cut off?") from None
    return _Layout(header, len(data) - 8 - size)


def _about(header: Any) -> dict[str, Any]:
    text = header.get("__metadata__", {}).get(_ENTRY) if isinstance(header, dict) else None
    if not isinstance(text, str):
        raise AdapterFileError(
            "a safetensors file, but not a veratune adapter: it has no 'veratune' metadata"
        )
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"its metadata is not JSON ({error})") from None
    if not isinstance(about, dict) or about.get("version") != VERSION:
        version = about.get("version") if isinstance(about, dict) else None
        raise AdapterFileError(
            f"its format version is {version!r}; this veratune reads version {VERSION}"
        )
    return about


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _pack(about: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """A file with these metadata, its digest added, and these tensors, in the order of their names."""
    labels = [_label(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    contents = [tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in tensors.values()]
    digest = _digest(hashlib.sha256(_text_of(about)), labels, contents)
    return safetensors.torch.save(tensors, {_ENTRY: _canonical(about | {"digest": digest})})


def _digest(start: "hashlib._Hash", labels: Iterable[bytes], contents: Iterable[memoryview]) -> str:
    """The digest of a file: of its metadata, hashed already, and of what each tensor is and holds."""
    digest = start.copy()
    for label, content in zip(labels, contents, strict=True):
        digest.update(label)
        digest.update(content)
    return digest.hexdigest()


def _text_of(about: dict[str, Any]) -> bytes:
    return _canonical(about).encode("utf-8", "surrogatepass")


def _label(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    return f"\0{name}\0{dtype}\0{list(shape)}\0".encode("utf-8", "surrogatepass")


def _to_text(weight_fingerprint: Tensor | None) -> str:
    return (
        ""
        if weight_fingerprint is None
        else base64.b64encode(
            weight_fingerprint.view(torch.int16).numpy().astype("<i2").tobytes()
        ).decode()
    )


def _from_text(text: str) -> Tensor | None:
    if not text:
        return None
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), dtype="<i2")
    except binascii.Error as error:
        raise ValueError(f"the base model's probe is not base64 ({error})") from None
    if len(values) != FINGERPRINT_VALUES:
        raise ValueError(
            f"the base model's probe has {len(values)} values, {FINGERPRINT_VALUES} are wanted"
        )
    return torch.from_numpy(values.astype(np.int16)).view(torch.bfloat16)
