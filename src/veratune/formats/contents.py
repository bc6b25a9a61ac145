"""The checked content of an adapter file's header, whatever its version."""

import abc
import base64
import binascii
import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from veratune.adapter import Adapter
from veratune.basis.basis import basis_of
from veratune.config import VeraConfig
from veratune.errors import AdapterFileError, BasisError, VeratuneError
from veratune.fingerprint import BASE_VALUES, FINGERPRINT_VALUES

# Values of A or B that one layer may want: a file is compared with a model only after this check.
_MAX_MATRIX_VALUES = 2**31


@dataclasses.dataclass(frozen=True)
class Vectors:
    """The tensors of one file, by layer (d, b) or by name (head)."""

    d: dict[str, Tensor]
    b: dict[str, Tensor]
    head: dict[str, Tensor]


class Contents(abc.ABC):
    """A checked file header; `adapter` adds one file's tensors."""

    config: VeraConfig
    shapes: dict[str, tuple[int, int]]
    kernels: dict[str, tuple[int, ...]]
    ranks: dict[str, int] | None
    base_id: str
    weight_fingerprint: Tensor | None
    task: dict[str, Any]
    lora_fingerprint: str
    base_fingerprint: Tensor | None

    @abc.abstractmethod
    def vectors(self, body: bytearray) -> Vectors:
        """The vectors and heads in a file's body, as views of it."""

    def adapter(self, body: memoryview) -> Adapter:
        """The adapter of one file with this header."""
        vectors = self.vectors(bytearray(body))  # a copy: the tensors may be written to
        return Adapter(
            config=self.config,
            shapes=dict(self.shapes),
            d=vectors.d,
            b=vectors.b,
            head=vectors.head,
            base_id=self.base_id,
            weight_fingerprint=self.weight_fingerprint,
            task=copy.deepcopy(self.task),
            kernels=dict(self.kernels),
            lora_fingerprint=self.lora_fingerprint,
            layer_ranks=self.ranks,
            base_fingerprint=self.base_fingerprint,
        )

    def check_layers(self) -> None:
        """Raise AdapterFileError for sizes, ranks and kernels that no layer has."""
        ranks = self.ranks or {}
        for layer, (m, n) in self.shapes.items():
            rank = ranks.get(layer, self.config.rank)
            if m < 1 or n < 1 or rank < 1 or max(m, n) * rank > _MAX_MATRIX_VALUES:
                raise AdapterFileError(
                    f"layer '{layer}' claims the size {n} -> {m} at rank {rank}, which no layer has"
                )
        for layer, kernel in self.kernels.items():
            if layer not in self.shapes or not 1 <= len(kernel) <= 3 or min(kernel) < 1:
                raise AdapterFileError(
                    f"it says that layer '{layer}' has a kernel of {list(kernel)}, which no "
                    "convolution of its layers has"
                )

    def check_basis(self, fingerprint: str) -> None:
        """Raise BasisError if A and B as drawn here are not those of the file."""
        if self.config.basis in ("lora", "principal"):  # compared when the adapter enters a model
            self.lora_fingerprint = fingerprint
            return
        if basis_of(self.config, self.shapes).fingerprint() != fingerprint:
            raise BasisError(
                f"the basis drawn here (seed {self.config.seed}, basis={self.config.basis!r}) is "
                "not "
                "the one the adapter was trained with: its fingerprint differs. The file is of "
                "another version, or was changed"
            )


def parse_config(metadata: Mapping[str, Any]) -> VeraConfig:
    """The VeraConfig of a file. Raises AdapterFileError for an invalid setting."""
    try:
        return VeraConfig.from_dict(metadata["config"])
    except VeratuneError as error:
        raise AdapterFileError(f"its configuration is not valid: {error}") from None


def bad_entry(error: Exception) -> AdapterFileError:
    """The error of metadata that lack an entry or have one of the wrong type."""
    return AdapterFileError(
        f"its metadata lacks or garbles an entry ({type(error).__name__}: {error})"
    )


def head_tensors(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors under "head/", by the name behind it."""
    prefix = "head/"
    return {
        name.removeprefix(prefix): tensor for name, tensor in tensors if name.startswith(prefix)
    }


def fingerprint_to_text(values: Tensor | None) -> str:
    """A weight fingerprint as base64 of bfloat16; empty for None."""
    if values is None:
        return ""
    return base64.b64encode(values.view(torch.int16).numpy().astype("<i2").tobytes()).decode()


def fingerprint_from_text(text: str) -> Tensor | None:
    """The inverse of `fingerprint_to_text`. Raises ValueError."""
    if not text:
        return None
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), dtype="<i2")
    except binascii.Error as error:
        raise ValueError(f"the base model's weight fingerprint is not base64 ({error})") from None
    if len(values) != FINGERPRINT_VALUES:
        raise ValueError(
            f"the base model's weight fingerprint has {len(values)} values, {FINGERPRINT_VALUES} "
            "are wanted"
        )
    return torch.from_numpy(values.astype(np.int16)).view(torch.bfloat16)


def sample_to_json(values: Tensor | None) -> dict[str, list[int | str]]:
    """A base fingerprint as the entry "sample"; no entry for None."""
    if values is None:
        return {}
    text = base64.b64encode(values.numpy().tobytes()).decode()
    return {"sample": [values.shape[1], text]}


def sample_from_json(base: Mapping[str, Any]) -> Tensor | None:
    """The inverse of `sample_to_json`. Raises ValueError."""
    if "sample" not in base:
        return None
    count, text = base["sample"]
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.int8)
    except binascii.Error as error:
        raise ValueError(f"the base model's sample is not base64 ({error})") from None
    if (
        type(count) is not int
        or count < 1
        or not 0 < len(values) <= BASE_VALUES
        or (len(values) % count)
    ):
        raise ValueError(
            f"the base model's sample has {len(values)} values, {count} for each matrix; at most "
            f"{BASE_VALUES} are allowed"
        )
    return torch.from_numpy(values.copy()).view(-1, count)
