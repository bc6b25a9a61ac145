"""Merging: W <- W + ΔW, and how much of ΔW the rounding of W lost."""

import dataclasses
import math
from collections.abc import Iterable

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """Rounding error of merging one weight in its own precision.

    Args:
        layer: Name of the weight.
        delta_norm: Frobenius norm of ΔW.
        lost: Norm of the rounding error, relative to `delta_norm` (0: nothing, 1: all of ΔW).
    """

    layer: str
    delta_norm: float
    lost: float


def total_rounding_error(report: Iterable[MergeReport]) -> float:
    """Rounding error over all layers, relative to the norm of all ΔW; 0 without any ΔW."""
    entries = list(report)
    norm = math.sqrt(sum(entry.delta_norm**2 for entry in entries))
    lost = math.sqrt(sum((entry.lost * entry.delta_norm) ** 2 for entry in entries))
    return lost / norm if norm else 0.0


def merge_weight(weight: Tensor, delta: Tensor, name: str) -> MergeReport:
    """Add ΔW to a weight in place: summed in ΔW's dtype and rounded once.

    Args:
        weight: W, written to.
        delta: ΔW in W's layout, float32 or float64.
        name: Name for the report.

    Returns:
        The rounding error.
    """
    wide = weight.to(delta.dtype, copy=True)
    weight.copy_(wide + delta)
    error = (weight.to(delta.dtype) - wide - delta).norm()
    norm = delta.norm()
    return MergeReport(name, norm.item(), (error / norm).item() if norm > 0 else 0.0)
