"""Lower the rank of LoRA pairs by the singular value decomposition of ΔW.

Cutting ΔW = U S Vᵀ after k singular values leaves a relative error of
sqrt(sum of S[k:]²) / sqrt(sum of S²), the least that any rank k can have (Eckart and Young, 1936).
"""

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from veratune.errors import ConfigError
from veratune.formats.lora_matrices import LoraPair


@dataclasses.dataclass(frozen=True)
class LayerError:
    """The error of one layer's ΔW.

    Attributes:
        layer: The layer's path.
        rank: The rank that is left.
        norm: Frobenius norm of ΔW.
        error: Frobenius norm of what was cut off, as a fraction of `norm`.
    """

    layer: str
    rank: int
    norm: float
    error: float


def total_error(report: list[LayerError]) -> float:
    """The relative error over all layers: sqrt(sum of squared errors) / sqrt(sum of norms²)."""
    norm = math.sqrt(sum(entry.norm**2 for entry in report))
    lost = math.sqrt(sum((entry.error * entry.norm) ** 2 for entry in report))
    return lost / norm if norm else 0.0


def reduce_rank(
    pairs: Mapping[str, LoraPair], *, rank: int | None = None, tolerance: float | None = None
) -> tuple[dict[str, LoraPair], list[LayerError]]:
    """Lower the rank of every layer.

    Args:
        pairs: LoRA pairs by layer.
        rank: The highest rank that a layer may have afterwards.
        tolerance: The highest relative error of a layer, in [0, 1); the least rank for it is taken.
            With `rank` too, both must hold.

    Returns:
        The new pairs, and the error of each layer. A layer within `rank` is left as it is when no
        tolerance is given.

    Raises:
        ConfigError: Neither or bad values; or `tolerance` cannot be met at `rank`.
    """
    if rank is None and tolerance is None:
        raise ConfigError("give a rank or a tolerance to reduce to")
    if rank is not None and rank < 1:
        raise ConfigError(f"the rank to reduce to is {rank}; it must be at least 1")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ConfigError(f"the tolerance is {tolerance}; it must be in [0, 1)")
    out, report = {}, []
    for layer, pair in pairs.items():
        U, S, Vh = low_rank_svd(pair)
        norm = float(torch.linalg.vector_norm(S))
        if tolerance is None:
            least = min(rank or pair.rank, pair.rank)
        else:
            least = _least_rank(S, tolerance)
            if rank is not None and least > rank:
                raise ConfigError(
                    f"layer '{layer}' needs rank {least} for a relative error of {tolerance:g}; "
                    f"{rank} is the limit. Allow a larger error"
                )
        if least >= pair.rank:
            out[layer] = pair
            report.append(LayerError(layer, pair.rank, norm, 0.0))
            continue
        least = min(least, len(S))  # a small layer has fewer singular values
        kept = S[:least].sqrt()
        A, B = kept[:, None] * Vh[:least], U[:, :least] * kept
        out[layer] = LoraPair(A.float(), B.float(), pair.kernel)
        error = float(torch.linalg.vector_norm(S[least:])) / norm if norm else 0.0
        report.append(LayerError(layer, least, norm, error))
    return out, report


def padded(pairs: Mapping[str, LoraPair], rank: int) -> dict[str, LoraPair]:
    """The pairs at one rank for all layers: zeros are added, ΔW stays the same."""
    out = {}
    for layer, pair in pairs.items():
        A = torch.zeros(rank, pair.A.shape[1])
        B = torch.zeros(pair.B.shape[0], rank)
        A[: pair.rank], B[:, : pair.rank] = pair.A, pair.B
        out[layer] = LoraPair(A, B, pair.kernel)
    return out


def low_rank_svd(pair: LoraPair) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,), Vᵀ (k, n) of ΔW = B A in float64, through a k x k matrix only."""
    Q, R = torch.linalg.qr(pair.B.double())
    P, L = torch.linalg.qr(pair.A.double().T)
    U, S, Vh = torch.linalg.svd(R @ L.T, full_matrices=False)
    return Q @ U, S, Vh @ P.T


def _least_rank(S: Tensor, tolerance: float) -> int:
    """The fewest singular values whose tail is within the tolerance; at least 1."""
    tails = S.square().flip(0).cumsum(0).flip(0).sqrt()  # tails[k]: what is cut off at rank k
    limit = tolerance * float(tails[0])
    return max(1, int((tails > limit).sum()))
