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
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from veratune.adapter import PROBE, Adapter
from veratune.config import VeraConfig
from veratune.errors import AdapterFileError, BasisError, VeratuneError
from veratune.formats.atomic import write_atomic

VERSION = 1
SUFFIX = ".safetensors"
_ENTRY = "veratune"
_LARGEST = 2**34  # bytes; an adapter with a trained head may be large, one beyond this is a mistake
_LARGEST_BASIS = 2**31  # values; what a file may make this machine draw before its layers were compared with a model's
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
            raise AdapterFileError(f"it has {path.stat().st_size:,} bytes; an adapter has at most {_LARGEST:,}")
        return decode(path.read_bytes())
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except AdapterFileError as error:
        raise type(error)(f"{path}: {error}") from error


def encode(adapter: Adapter) -> bytes:
    """An adapter as the bytes of its file."""
    tensors = {f"d/{k}": v for k, v in adapter.d.items()} | {f"b/{k}": v for k, v in adapter.b.items()}
    tensors |= {f"head/{k}": v for k, v in adapter.head.items()}
    tensors = {name: tensors[name].contiguous() for name in sorted(tensors)}
    about = {
        "version": VERSION,
        "config": adapter.config.to_dict(),
        "basis": adapter.fingerprint,
        "base": {"id": adapter.base_id, "probe": _to_text(adapter.probe)},
        "shapes": [list(adapter.shapes[layer]) for layer in sorted(adapter.shapes)],
        "task": dict(adapter.task),
    }
    if adapter.kernels:
        about["kernels"] = {layer: list(kernel) for layer, kernel in adapter.kernels.items()}
    about["digest"] = _digest(about, tensors)
    return safetensors.torch.save(tensors, {_ENTRY: _canonical(about)})


def decode(data: bytes) -> Adapter:
    """The adapter in a file's bytes.

    Checked, in this order: the container (sizes, offsets, overlaps), the metadata's form and version, the
    digest, the settings, every tensor's name, dtype, shape and finiteness, the basis' fingerprint.
    Raises AdapterFileError, or BasisError where the matrices made here would be others.
    """
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, ValueError, KeyError, RecursionError, OverflowError) as error:
        raise AdapterFileError(f"not a whole safetensors file ({error}); was it cut off?") from None
    about = _about(header)
    kinds = {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    if about.get("digest") != _digest({k: v for k, v in about.items() if k != "digest"}, tensors):
        raise AdapterFileError("its content does not match its digest: it was damaged or tampered with")
    try:
        config = VeraConfig.from_dict(about["config"])
        shapes = [(int(m), int(n)) for m, n in about["shapes"]]
        base_id, probe = str(about["base"]["id"]), _from_text(about["base"]["probe"])
        fingerprint, task = str(about["basis"]), dict(about["task"])
        kernels = {layer: tuple(map(int, kernel)) for layer, kernel in about.get("kernels", {}).items()}
    except VeratuneError as error:
        raise AdapterFileError(f"its configuration is not valid: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"its metadata lacks or garbles an entry ({type(error).__name__}: {error})") from None
    found: dict[str, dict[str, Tensor]] = {"d": {}, "b": {}, "head": {}}
    for name in sorted(tensors):  # safetensors hands them out in another order each time
        tensor = tensors[name]
        kind, _, layer = name.partition("/")
        if kind not in found or not layer:
            raise AdapterFileError(f"tensor {name!r} is neither d/<layer>, b/<layer> nor head/<name>")
        if kind != "head" and kinds[name] not in _FLOATS:
            raise AdapterFileError(f"tensor {name!r} is of dtype {kinds[name]}; one of {', '.join(_FLOATS)} is wanted")
        found[kind][layer] = tensor
    layers = sorted(set(found["d"]) | set(found["b"]))
    if len(layers) != len(shapes):
        raise AdapterFileError(f"it has vectors for {len(layers)} layers and shapes for {len(shapes)}")
    by_layer = dict(zip(layers, shapes, strict=True))
    for layer, (m, n) in by_layer.items():
        if m < 1 or n < 1 or max(m, n) * config.rank > _LARGEST_BASIS:
            raise AdapterFileError(f"layer '{layer}' claims the size {n} -> {m} at rank {config.rank}, which no layer has")
    for layer, kernel in kernels.items():
        if layer not in by_layer or not 1 <= len(kernel) <= 3 or min(kernel) < 1:
            raise AdapterFileError(
                f"it says that layer '{layer}' has a kernel of {list(kernel)}, which no convolution of its layers has"
            )
    over = fingerprint if config.basis == "lora" else ""  # compared with the LoRA when the adapter goes into a model
    adapter = Adapter(config, by_layer, found["d"], found["b"], found["head"], base_id, probe, task, kernels, over)
    if adapter.fingerprint != fingerprint:
        raise BasisError(
            f"the basis drawn here (seed {config.seed}, basis={config.basis!r}) is not the one the adapter was trained "
            "with: its fingerprint differs. The file is of another version, or was changed"
        )
    return adapter


def _about(header: Any) -> dict[str, Any]:
    text = header.get("__metadata__", {}).get(_ENTRY) if isinstance(header, dict) else None
    if not isinstance(text, str):
        raise AdapterFileError("a safetensors file, but not a veratune adapter: it has no 'veratune' metadata")
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"its metadata is not JSON ({error})") from None
    if not isinstance(about, dict) or about.get("version") != VERSION:
        version = about.get("version") if isinstance(about, dict) else None
        raise AdapterFileError(f"its format version is {version!r}; this veratune reads version {VERSION}")
    return about


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _digest(about: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(_canonical(about).encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode("utf-8", "surrogatepass"))
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _to_text(probe: Tensor | None) -> str:
    return "" if probe is None else base64.b64encode(probe.view(torch.int16).numpy().astype("<i2").tobytes()).decode()


def _from_text(text: str) -> Tensor | None:
    if not text:
        return None
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), dtype="<i2")
    except binascii.Error as error:
        raise ValueError(f"the base model's probe is not base64 ({error})") from None
    if len(values) != PROBE:
        raise ValueError(f"the base model's probe has {len(values)} values, {PROBE} are wanted")
    return torch.from_numpy(values.astype(np.int16)).view(torch.bfloat16)
