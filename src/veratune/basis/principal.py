"""PrincipalBasis: A and B from the leading singular directions of a layer's own frozen weight."""

import base64
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from veratune.basis.basis import Basis
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

_SAMPLED_LAYERS = 8  # of a fingerprint
_SAMPLES = 8  # numbers for each of them
_TOLERANCE = 1e-3  # of a fingerprint's numbers, relative to their root mean square
_PREFIX = "principal:"

Weight = Callable[[], Tensor]


class PrincipalBasis(Basis):
    """ΔW = 2 sqrt(m / r) U_r diag(d) V_rᵀ, where W = U diag(s) Vᵀ is the layer's frozen weight.

    A = V_rᵀ (r, n) and B = 2 sqrt(m / r) U_r (m, r) are recomputed from the weights of the base
    model, never stored. They do not depend on the number of threads, and agree to 1e-5 between
    machines. The directions of each layer are computed on first use.

    Args:
        seed: Seed of the start of the subspace iteration.
        ranks: r by layer.
        weights: What returns W (m, n), by layer; called on first use.
        cache: Where the directions of large weights are kept on disk.

    Source: singular vectors with a trained diagonal, as in SVFT (arXiv 2405.19597).
    """

    def __init__(
        self,
        seed: int,
        ranks: Mapping[str, int],
        weights: Mapping[str, Weight],
        cache: DirectionCache | None = None,
    ) -> None:
        super().__init__()
        self._cache = DirectionCache() if cache is None else cache
        self.seed, self.ranks, self._weights = seed, dict(ranks), dict(weights)
        self._samples: dict[str, np.ndarray] = {}

    def roles(self, layer: str, out_features: int, in_features: int) -> tuple[str, str]:
        return f"A/{layer}", f"B/{layer}"

    def scale(self, rank: int, in_features: int) -> float:
        return 1.0

    def matrix(
        self, role: str, rows: int, columns: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """A or B of a layer; both are made at once, and one copy serves every adapter."""
        if device.type == "meta":
            return super().matrix(role, rows, columns, device, dtype)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if (role, device, dtype) not in self._matrices:
                self._compute(role.partition("/")[2], device, dtype)
            held = self._matrices[role, device, dtype]
        if held.shape != (rows, columns):
            raise BasisError(
                f"layer '{role.partition('/')[2]}': the principal directions are "
                f"{tuple(held.shape)}, "
                f"({rows}, {columns}) is wanted; attach the adapter anew"
            )
        return held

    def _compute(self, layer: str, device: torch.device, dtype: torch.dtype) -> None:
        for kind, made in zip("AB", self._made(layer), strict=True):
            self._matrices[f"{kind}/{layer}", device, dtype] = made.to(device, dtype)

    def generate(self, role: str, out: Tensor) -> None:
        rows, columns = out.shape
        out.copy_(self.matrix(role, rows, columns, torch.device("cpu"), out.dtype))

    def fingerprint(self) -> str:
        """Numbers that depend on every A and B of a sample of layers, as text; see `matches`."""
        data = self._numbers.astype("<f4").tobytes()
        return _PREFIX + base64.b64encode(data).decode()

    def matches(self, fingerprint: str) -> bool:
        """Whether a fingerprint is this basis', up to the rounding of another machine."""
        try:
            data = base64.b64decode(fingerprint.removeprefix(_PREFIX), validate=True)
            found = np.frombuffer(data, "<f4").astype(np.float64)
        except ValueError:
            return False
        own = self._numbers
        if not fingerprint.startswith(_PREFIX) or found.shape != own.shape:
            return False
        size = math.sqrt(float(np.mean(own**2)))
        return bool(np.all(np.abs(found - own) <= _TOLERANCE * size))

    def __getstate__(self) -> dict[str, object]:
        """With the matrices made so far: a pickled basis has no weights to make them from."""
        return super().__getstate__() | {"_weights": {}, "_pickled": dict(self._matrices)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        made = state.pop("_pickled")
        super().__setstate__(state)
        self._matrices.update(made)

    @functools.cached_property
    def _numbers(self) -> np.ndarray:
        """Return the numbers of the fingerprint: samples of layers spread evenly over all, by
        name.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            for layer in self._sampled:
                if layer not in self._samples:
                    self._compute(layer, torch.device("cpu"), torch.float32)
        return np.concatenate([self._samples[layer] for layer in self._sampled])

    @functools.cached_property
    def _sampled(self) -> tuple[str, ...]:
        names = sorted(self.ranks)
        places = np.linspace(0, len(names) - 1, min(len(names), _SAMPLED_LAYERS))
        return tuple(dict.fromkeys(names[int(place)] for place in places))

    def _made(self, layer: str) -> tuple[Tensor, Tensor]:
        """(A, B) of a layer: another device's copy in full precision, or computed from the
        weight.
        """
        for role, device, dtype in list(self._matrices):
            if role == f"A/{layer}" and device.type != "meta" and dtype.itemsize >= 4:
                return self._matrices[role, device, dtype], self._matrices[
                    f"B/{layer}", device, dtype
                ]
        if layer not in self._weights:
            raise BasisError(
                f"layer '{layer}': a principal basis needs the base model's weights, and there are "
                "none "
                "here; put the adapter into its base model first"
            )
        weight, rank = self._weights[layer](), self.ranks[layer]
        try:
            A, B = self._cached(weight, rank)
        except ValueError as error:
            raise BasisError(f"layer '{layer}': {error}") from None
        if layer in self._sampled:
            self._samples[layer] = _sample(A.double(), B.double(), self.seed)
        return A, B

    def _cached(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        if weight.numel() < SMALLEST:
            return _matrices(weight, rank, self.seed)
        key = self._cache.key(weight, f"{_VERSION}:{rank}:{self.seed}")
        shape = (weight.shape[0], weight.shape[1])
        found = self._cache.get(key, rank, shape)
        if found is None:
            found = _matrices(weight, rank, self.seed)
            self._cache.put(key, *found)
        return found


def _matrices(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    u, _, v = principal_directions(weight, rank, seed)
    return v.T.float().contiguous(), (2 * math.sqrt(len(u) / rank) * u).float()


def _sample(A: Tensor, B: Tensor, seed: int) -> np.ndarray:
    """Entries of P B diag(g) A Q, with P, Q random and every g_i another: joint signs cancel."""
    left = _start(seed + 1, B.shape[0], _SAMPLES) / math.sqrt(B.shape[0])
    right = _start(seed + 2, A.shape[1], _SAMPLES) / math.sqrt(A.shape[1])
    weights = torch.cos(torch.arange(1, len(A) + 1, dtype=torch.float64))
    return ((left.T @ B) * weights * (A @ right).T).sum(1).numpy()


def blank_fingerprint(layers: int) -> str:
    """A fingerprint of the right length for so many layers, which matches no basis."""
    numbers = min(layers, _SAMPLED_LAYERS) * _SAMPLES
    return _PREFIX + base64.b64encode(np.zeros(numbers, "<f4").tobytes()).decode()


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
    start = _start(seed, W.shape[1], width)
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


def _start(seed: int, rows: int, columns: int) -> Tensor:
    """The Philox matrix, uniform in [-1, 1)."""
    bits = random_words(seed % 2**64, _ROLE, range(rows), columns)
    return torch.from_numpy(values(bits, "kaiming_uniform")).double()
