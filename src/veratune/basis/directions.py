"""The leading singular directions of one frozen weight, and A and B made of them."""

import hashlib
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from veratune.basis.direction_cache import SMALLEST, DirectionCache
from veratune.basis.distributions import values
from veratune.basis.philox import random_words
from veratune.errors import BasisError

_VERSION = 1  # of the definition of the directions: raise it with every change of them
_STEPS = 6  # of subspace iteration; part of the definition of the basis
_OVERSAMPLING = 16  # extra directions at least; half the rank where that is more
_CLUSTER = 1e-7  # singular values closer than this share of the largest count as equal
_DEFICIENT = 1e-6  # a singular value below this share of the largest has no direction
_ROLE = int.from_bytes(hashlib.sha256(b"principal").digest()[:8], "little")
_CPU = torch.device("cpu")

Weight = Callable[[], Tensor]


class LayerDirections:
    """A = V_rᵀ (r, n) and B = 2 sqrt(m / r) U_r (m, r) of one weight W = U diag(s) Vᵀ.

    They are computed on first use, once for every device and dtype.

    Args:
        layer: The layer's name, for errors.
        weight: Returns W (m, n); None where there is none, so that nothing can be computed.
        rank: r.
        seed: Seed of the start of the subspace iteration.
        cache: Where the directions of large weights are kept on disk.
    """

    def __init__(
        self,
        layer: str,
        weight: Weight | None,
        rank: int,
        seed: int,
        cache: DirectionCache | None = None,
    ) -> None:
        self.layer, self.rank, self.seed = layer, rank, seed
        self._weight = weight
        self._cache = DirectionCache() if cache is None else cache
        self._pairs: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._lock = threading.Lock()

    def pair(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return (A, B).

        Raises:
            BasisError: There is no weight, it is not finite, or it has fewer than r directions.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            found = self._pairs.get((device, dtype))
            if found is None:
                A, B = self._made()
                found = self._pairs[device, dtype] = A.to(device, dtype), B.to(device, dtype)
            return found

    def tensors(self) -> list[Tensor]:
        """All copies in memory."""
        return [tensor for pair in self._pairs.values() for tensor in pair]

    def __getstate__(self) -> dict[str, Any]:
        """With the matrices made so far: a pickled basis has no weight to make them from."""
        return {k: v for k, v in self.__dict__.items() if k != "_lock"} | {"_weight": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _made(self) -> tuple[Tensor, Tensor]:
        """A copy in full precision, or (A, B) computed from the weight."""
        for (_, dtype), pair in self._pairs.items():
            if dtype.itemsize >= 4:
                return pair
        if self._weight is None:
            raise BasisError(
                f"layer '{self.layer}': a principal basis needs the base model's weights, and "
                "there are none here; put the adapter into its base model first"
            )
        weight = self._weight()
        try:
            return self._cached(weight)
        except ValueError as error:
            raise BasisError(f"layer '{self.layer}': {error}") from None

    def _cached(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if weight.numel() < SMALLEST:
            return _matrices(weight, self.rank, self.seed)
        key = self._cache.key(weight, f"{_VERSION}:{self.rank}:{self.seed}")
        shape = (weight.shape[0], weight.shape[1])
        found = self._cache.get(key, self.rank, shape)
        if found is None:
            found = _matrices(weight, self.rank, self.seed)
            self._cache.put(key, *found)
        return found


def _matrices(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    u, _, v = principal_directions(weight, rank, seed)
    return v.T.float().contiguous(), (2 * math.sqrt(len(u) / rank) * u).float()


def principal_directions(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of W, by subspace iteration and Rayleigh-Ritz, in float64.

    The start comes from the Philox generator and the number of steps is fixed. So the result is a
    function of W and the seed alone, whether or not the iteration has converged. Vectors of equal
    singular values are rotated to a fixed place in their subspace; the largest entry of each u_i
    is positive.

    Args:
        weight: W, shape (m, n).
        rank: r, at most min(m, n).
        seed: Seed of the start.

    Returns:
        U (m, r), s (r,) in falling order, V (n, r).

    Raises:
        ValueError: W is not finite, or has fewer than r directions.

    Source: Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53 (2011).
    """
    W = weight.detach().to("cpu", torch.float64)
    most = min(W.shape)
    if rank > most:
        raise ValueError(
            f"rank is {rank}, but a weight of shape {tuple(W.shape)} has {most} principal "
            "directions; "
            "set a rank of at most that many (rank_pattern sets it for some layers)"
        )
    if not bool(torch.isfinite(W).all()):
        raise ValueError("its weight holds NaN or infinity; there are no principal directions")
    width = min(most, rank + max(_OVERSAMPLING, rank // 2))
    start = start_matrix(seed, W.shape[1], width)
    basis = torch.linalg.qr(start).Q
    for _ in range(_STEPS):
        basis = torch.linalg.qr(W @ basis).Q
        basis = torch.linalg.qr(W.T @ basis).Q
    u, s, rotation = torch.linalg.svd(W @ basis, full_matrices=False)
    v = basis @ rotation.T
    if float(s[rank - 1]) <= _DEFICIENT * float(s[0]):
        found = int((s > _DEFICIENT * s[0]).sum())
        raise ValueError(
            f"its weight has {found} principal directions, but rank is {rank}; "
            "lower the rank or exclude the layer"
        )
    for first, last in _clusters(s):
        turn, upper = torch.linalg.qr(v[:, first:last].T @ start[:, : last - first])
        turn = turn * torch.where(upper.diagonal() < 0, -1.0, 1.0)
        u[:, first:last], v[:, first:last] = u[:, first:last] @ turn, v[:, first:last] @ turn
    u, v = u[:, :rank], v[:, :rank]
    signs = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True)))
    return u * signs, s[:rank], v * signs


def _clusters(s: Tensor) -> list[tuple[int, int]]:
    """Ranges of two and more singular values that count as equal."""
    near = ((s[:-1] - s[1:]) <= _CLUSTER * s[0]).tolist()
    out, first = [], 0
    for i, joined in enumerate([*near, False]):
        if not joined:
            if i > first:
                out.append((first, i + 1))
            first = i + 1
    return out


def start_matrix(seed: int, rows: int, columns: int) -> Tensor:
    """The Philox matrix of a seed, uniform in [-1, 1)."""
    bits = random_words(seed % 2**64, _ROLE, range(rows), columns)
    return torch.from_numpy(values(bits, "kaiming_uniform")).double()
