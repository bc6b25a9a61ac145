"""Adapter files of version 1, read for ever: one tensor for each vector.

Tensors: `d/<layer>`, `b/<layer>`, and `head/<name>`. Metadata:

    version   1
    config    every setting of VeraConfig
    basis     fingerprint of A and B
    base      id and probe (the weight fingerprint: base64 of bfloat16) of the base model
    shapes    [m, n] of each layer, layers in alphabetical order
    kernels   sizes of the kernels by layer, where there are convolutions
    task      what the adapter is for: the task's name, its columns and labels
    digest    SHA-256 of the rest of this object and of every tensor's name, dtype, shape and bytes
"""

from veratune.errors import AdapterFileError
from veratune.formats.container import FLOAT_DTYPES, Header
from veratune.formats.contents import (
    Contents,
    Vectors,
    bad_entry,
    fingerprint_from_text,
    parse_config,
)

VERSION = 1


class Version1(Contents):
    """A header of version 1. Raises AdapterFileError or BasisError when it is not valid."""

    def __init__(self, header: Header) -> None:
        metadata = header.metadata
        self.ranks, self.lora_fingerprint, self.base_fingerprint = None, "", None
        try:
            self.config = parse_config(metadata)
            shapes = [(int(m), int(n)) for m, n in metadata["shapes"]]
            self.base_id = str(metadata["base"]["id"])
            self.weight_fingerprint = fingerprint_from_text(metadata["base"]["probe"])
            fingerprint, self.task = str(metadata["basis"]), dict(metadata["task"])
            self.kernels = {
                layer: tuple(map(int, kernel))
                for layer, kernel in metadata.get("kernels", {}).items()
            }
        except AdapterFileError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise bad_entry(error) from None
        self._entries = header.entries
        self._names = [
            (kind, layer)
            for kind, _, layer in (entry.name.partition("/") for entry in header.entries)
        ]
        layers = self._check_tensors()
        if len(layers) != len(shapes):
            raise AdapterFileError(
                f"it has vectors for {len(layers)} layers and shapes for {len(shapes)}"
            )
        self.shapes = dict(zip(sorted(layers), shapes, strict=True))
        self.check_layers()
        self.check_basis(fingerprint)

    def _check_tensors(self) -> set[str]:
        """The layers that have vectors."""
        layers: set[str] = set()
        for entry, (kind, layer) in zip(self._entries, self._names, strict=True):
            if kind not in ("d", "b", "head") or not layer:
                raise AdapterFileError(
                    f"tensor {entry.name!r} is neither d/<layer>, b/<layer> nor head/<name>"
                )
            if kind == "head":
                continue
            if entry.dtype_name not in FLOAT_DTYPES:
                raise AdapterFileError(
                    f"tensor {entry.name!r} is of dtype {entry.dtype_name}; one of "
                    f"{', '.join(FLOAT_DTYPES)} is wanted"
                )
            layers.add(layer)
        return layers

    def vectors(self, body: bytearray) -> Vectors:
        out: dict[str, dict] = {"d": {}, "b": {}, "head": {}}
        for entry, (kind, layer) in zip(self._entries, self._names, strict=True):
            out[kind][layer] = entry.tensor(body)
        return Vectors(out["d"], out["b"], out["head"])
