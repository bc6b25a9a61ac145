"""Basis: the frozen A and B of every layer, for every adapter, device and dtype.

A basis holds each matrix once for every (device, dtype), at the largest size anyone asked for, and
hands out views. It is immutable as seen from outside, shared between adapters, copied by nobody
(deepcopy returns the same object), and freed with the last layer that uses it.
"""

import abc
import hashlib
import math
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from veratune.basis.distributions import gain, values
from veratune.basis.philox import random_words
from veratune.config import Init, Sharing, VeraConfig
from veratune.ops.matrix import ColumnBlocks, Matrix, RowBlocks, grid_rows

_CHUNK = 2**14  # Philox counters at a time: what stays in a core's cache

# Sampled by the fingerprint: the corner that every layer uses, and far places that only large ones
# do.
_SAMPLE_ROWS = (0, 1, 2, 3, 255, 1023, 65535)
_SAMPLE_COLUMNS = 4096


class Basis(abc.ABC):
    """The frozen pair (A, B) of every layer.

    Subclasses say which named matrix a layer uses, what is in it, and the scale of the product.
    """

    def __init__(self) -> None:
        self._matrices: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._lock = threading.Lock()

    @abc.abstractmethod
    def roles(self, layer: str, out_features: int, in_features: int) -> tuple[str, str]:
        """The names of the layer's A and of its B; layers with equal names share the matrix."""

    @abc.abstractmethod
    def scale(self, rank: int, in_features: int) -> float:
        """The factor s of ΔW = s diag(b) B diag(d) A, with A and B as `pair` gives them."""

    @abc.abstractmethod
    def generate(self, role: str, out: Tensor) -> None:
        """Fill `out`, a CPU matrix, with the values of the matrix `role` from row 0 and column 0
        on.
        """

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A hash of a fixed sample of values: equal fingerprints, equal matrices."""

    def sizes(
        self, out_features: int, in_features: int, rank: int
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """(rows, columns) of the values that a layer's A and its B are made of."""
        return (rank, in_features), (out_features, rank)

    def pair(
        self,
        layer: str,
        out_features: int,
        in_features: int,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> tuple[Matrix, Matrix]:
        """(A, B) of a layer, of shape (rank, in_features) and (out_features, rank): views, or
        blocks.

        Source of the cut: VeRA's shared matrices are sliced to each layer's size, arXiv 2310.11454
        section 3.1.
        """
        roles = self.roles(layer, out_features, in_features)
        first, second = self.sizes(out_features, in_features, rank)
        return self.matrix(roles[0], *first, device, dtype), self.matrix(
            roles[1], *second, device, dtype
        )

    def matrix(
        self, role: str, rows: int, columns: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """The first `rows` and `columns` of a matrix: a view of the one copy, made or enlarged when
        needed.
        """
        held = self._matrices.get((role, device, dtype))
        if held is None or held.shape[0] < rows or held.shape[1] < columns:
            held = self._grow(role, rows, columns, device, dtype)
        return held[:rows, :columns]

    def reserve(
        self, layers: Iterable[tuple[str, int, int, int]], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Make what these layers will ask for, (name, out_features, in_features, rank) each, once
        and at full size.
        """
        for role, (rows, columns) in self._wanted(layers).items():
            self.matrix(role, rows, columns, device, dtype)

    def bytes_of(self, layers: Iterable[tuple[str, int, int, int]], dtype: torch.dtype) -> int:
        """Bytes of the matrices that `reserve` would make."""
        return sum(
            rows * columns * dtype.itemsize for rows, columns in self._wanted(layers).values()
        )

    def _wanted(self, layers: Iterable[tuple[str, int, int, int]]) -> dict[str, tuple[int, int]]:
        """(rows, columns) of each matrix that some layers share, by its role."""
        sizes: dict[str, tuple[int, int]] = {}
        for layer, out_features, in_features, rank in layers:
            for role, size in zip(
                self.roles(layer, out_features, in_features),
                self.sizes(out_features, in_features, rank),
                strict=True,
            ):
                held = sizes.get(role, (0, 0))
                sizes[role] = (max(held[0], size[0]), max(held[1], size[1]))
        return sizes

    def allocated_bytes(self) -> int:
        """Bytes of all matrices in memory, over all devices and dtypes."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        """All matrices in memory."""
        return list(self._matrices.values())

    def _grow(
        self, role: str, rows: int, columns: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        # Not as inference tensors: a later call may train on them.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            key = (role, device, dtype)
            held = self._matrices.get(key)
            if held is not None:
                rows, columns = max(rows, held.shape[0]), max(columns, held.shape[1])
                if held.shape == (rows, columns):  # another thread was faster
                    return held
            del held
            self._matrices.pop(key, None)
            if device.type == "meta":
                made = torch.empty(rows, columns, dtype=dtype, device=device)
            else:
                made = torch.empty(rows, columns, dtype=dtype)
                self.generate(role, made)
                made = made.to(device)
            self._matrices[key] = made
            return made

    def __deepcopy__(self, memo: dict[int, Any]) -> "Basis":
        return self

    def __getstate__(self) -> dict[str, object]:
        """Without the lock and the matrices, which are drawn again: a pickled model stays small."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_matrices")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._matrices = {}
        self._lock = threading.Lock()


class RandomBasis(Basis):
    """Values of a counter-based generator: element (i, j) of a matrix is a function of (seed, role,
    i, j).

    Args as in VeraConfig. The Kaiming gains follow each layer's own fan-in: n for A and r for B.
    """

    def __init__(self, seed: int, init: Init, sharing: Sharing) -> None:
        super().__init__()
        self.seed, self.init, self.sharing = seed, init, sharing
        self._fingerprints: dict[str, str] = {}  # asked for whenever a file is read

    def roles(self, layer: str, out_features: int, in_features: int) -> tuple[str, str]:
        suffix = {
            "shared": "",
            "per_shape": f"/{out_features}x{in_features}",
            "unique": f"/{layer}",
        }[self.sharing]
        return f"A{suffix}", f"B{suffix}"

    def scale(self, rank: int, in_features: int) -> float:
        return gain(self.init, in_features) * gain(self.init, rank)

    def generate(self, role: str, out: Tensor) -> None:
        rows, columns = out.shape
        step = max(1, _CHUNK * 4 // max(columns, 1))
        number = _role_number(role)
        for start in range(0, rows, step):
            block = range(start, min(rows, start + step))
            bits = random_words(self.seed, number, block, columns)
            out[block.start : block.stop] = torch.from_numpy(values(bits, self.init))

    def fingerprint(self) -> str:
        return self._fingerprint(f"{self.init}:{self.sharing}", ("A", "B"))

    def _fingerprint(self, kind: str, roles: tuple[str, str]) -> str:
        if kind not in self._fingerprints:
            digest = hashlib.sha256(kind.encode())
            for role in roles:
                for row in _SAMPLE_ROWS:
                    bits = random_words(
                        self.seed, _role_number(role), range(row, row + 1), _SAMPLE_COLUMNS
                    )
                    digest.update(values(bits, self.init).astype("<f4").tobytes())
            self._fingerprints[kind] = digest.hexdigest()[:32]
        return self._fingerprints[kind]


class MonarchBasis(RandomBasis):
    """The same generator's values as small blocks (see `basis.blocks`): products in about √r times
    less work.

    Each row of A and of B has as many values as its block is wide; the Kaiming gains follow that
    width, so that ΔW starts at the size that it has with full matrices.
    """

    def roles(self, layer: str, out_features: int, in_features: int) -> tuple[str, str]:
        a, b = super().roles(layer, out_features, in_features)
        return f"blocks/{a}", f"blocks/{b}"

    def sizes(
        self, out_features: int, in_features: int, rank: int
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        q = grid_rows(rank, in_features)
        k = math.ceil(rank / q)
        return (q * k, math.ceil(in_features / q)), (math.ceil(out_features / k), q)

    def pair(
        self,
        layer: str,
        out_features: int,
        in_features: int,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> tuple[Matrix, Matrix]:
        roles = self.roles(layer, out_features, in_features)
        first, second = self.sizes(out_features, in_features, rank)
        blocks = self.matrix(roles[0], *first, device, dtype).unflatten(0, (second[1], -1))
        return RowBlocks((rank, in_features), blocks), ColumnBlocks(
            (out_features, rank), self.matrix(roles[1], *second, device, dtype)
        )

    def scale(self, rank: int, in_features: int) -> float:
        q = grid_rows(rank, in_features)
        return gain(self.init, math.ceil(in_features / q)) * gain(self.init, q)

    def fingerprint(self) -> str:
        return self._fingerprint(f"blocks:{self.init}:{self.sharing}", ("blocks/A", "blocks/B"))


class PeftBasis(Basis):
    """The matrices of Hugging Face PEFT's VeRA, bit for bit: A (r, max_in), then B (max_out, r).

    seed: PEFT's projection_prng_key. max_in, max_out: the largest sizes among the adapted layers;
    PEFT's values and their scale depend on them. Source: peft 0.21.2, tuners/vera/model.py.
    """

    def __init__(self, seed: int, rank: int, max_in: int, max_out: int) -> None:
        super().__init__()
        self.seed, self.rank, self.max_in, self.max_out = seed, rank, max_in, max_out

    def roles(self, layer: str, out_features: int, in_features: int) -> tuple[str, str]:
        return "A", "B"

    def scale(self, rank: int, in_features: int) -> float:
        return 1.0

    def generate(self, role: str, out: Tensor) -> None:
        drawn = self._draw()[0 if role == "A" else 1]
        out.copy_(drawn[: out.shape[0], : out.shape[1]])

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"peft:{self.rank}:{self.max_in}:{self.max_out}".encode())
        for drawn in self._draw():
            flat = drawn.flatten()
            ends = torch.cat([flat[:_SAMPLE_COLUMNS], flat[-_SAMPLE_COLUMNS:]])
            digest.update(ends.numpy().astype("<f4").tobytes())
        return digest.hexdigest()[:32]

    def _draw(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        drawn = []
        for shape in ((self.rank, self.max_in), (self.max_out, self.rank)):
            # PEFT's own expression, term by term: another order would round to another bound.
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
            drawn.append(
                torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
            )
        return drawn[0], drawn[1]


_KINDS: dict[str, type[Any]] = {"random": RandomBasis, "peft": PeftBasis, "monarch": MonarchBasis}
_LIVE: "weakref.WeakValueDictionary[tuple[Any, ...], Basis]" = weakref.WeakValueDictionary()
_LIVE_LOCK = threading.Lock()


def basis_of(config: VeraConfig, shapes: dict[str, tuple[int, int]]) -> Basis:
    """The basis of an adapter; adapters that may share one get the same object.

    shapes: (out_features, in_features) of each adapted layer. Only basis="peft" looks at it.
    """
    key = _key(config, shapes)
    with _LIVE_LOCK:
        basis = _LIVE.get(key)
        if basis is None:
            basis = _LIVE[key] = new_basis(config, shapes)
        return basis


def new_basis(config: VeraConfig, shapes: dict[str, tuple[int, int]]) -> Basis:
    """The basis of an adapter as an object of its own."""
    kind, *rest = _key(config, shapes)
    return _KINDS[kind](*rest)


def _key(config: VeraConfig, shapes: dict[str, tuple[int, int]]) -> tuple[Any, ...]:
    if config.basis == "peft":
        max_out, max_in = (max(sizes) for sizes in zip(*shapes.values(), strict=True))
        return ("peft", config.seed, config.rank, max_in, max_out)
    return (config.basis, config.seed, config.init, config.sharing)


def _role_number(role: str) -> int:
    """The 64-bit number of a role: the first bytes of its SHA-256, little-endian."""
    return int(np.frombuffer(hashlib.sha256(role.encode()).digest()[:8], dtype="<u8")[0])
