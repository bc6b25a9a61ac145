"""Fit VeRA vectors to a given weight difference by least squares over d and b.

    minimize over d, b   sum over layers of | s diag(b) B diag(d) A - ΔW |²

For fixed d the best b is one division a row; for fixed b the best d solves an r x r system. The two
steps alternate. They start from X = ΔW A⁺: where ΔW is a VeRA of this basis with r <= n,
X = s diag(b) B diag(d), so X / (s B) has rank 1 and gives b and d at once.
"""

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from veratune.adapter import Adapter, base_id
from veratune.basis.basis import Basis, basis_of
from veratune.basis.lora import LoraBasis
from veratune.config import VeraConfig
from veratune.errors import ConfigError
from veratune.formats.lora_matrices import LoraPair
from veratune.formats.reduction import LayerError
from veratune.ops.matrix import dense
from veratune.targets import find_sites

_STEPS = 30
_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Difference:
    """ΔW = left @ right of one layer, so that a LoRA is never multiplied out.

    Attributes:
        left: Shape (m, k).
        right: Shape (k, n).
    """

    left: Tensor
    right: Tensor

    @property
    def norm(self) -> float:
        """Frobenius norm, from k x k matrices only."""
        gram = (self.left.T @ self.left) * (self.right @ self.right.T)
        return math.sqrt(max(float(gram.sum()), 0.0))


def differences_of_lora(lora: LoraBasis) -> dict[str, Difference]:
    """ΔW = B A of each layer of a LoRA."""
    return {layer: Difference(B.double(), A.double()) for layer, (A, B) in lora.pairs.items()}


def difference_of_weights(base: Tensor, tuned: Tensor) -> Difference:
    """ΔW = tuned - base of two weights (m, n); a convolution's kernel is flattened."""
    delta = tuned.double().flatten(1) - base.double().flatten(1)
    if delta.shape[0] <= delta.shape[1]:
        return Difference(torch.eye(delta.shape[0], dtype=torch.float64), delta)
    return Difference(delta, torch.eye(delta.shape[1], dtype=torch.float64))


def fit_adapter(
    differences: Mapping[str, Difference], model: nn.Module, config: VeraConfig
) -> tuple[Adapter, list[LayerError]]:
    """Fit an adapter's d and b to weight differences.

    Args:
        differences: ΔW by layer.
        model: The base model; the meta device will do.
        config: The adapter's rank and basis. Its targets become the layers of `differences`, whole.

    Returns:
        The adapter, and the relative error of each layer.

    Raises:
        ConfigError: A basis or setting that has nothing to fit.
        TargetError: The model lacks a layer.
    """
    if config.basis == "lora" or config.vectors != "both" or config.head:
        raise ConfigError("fitting takes basis random, peft or monarch, both vectors and no head")
    config = dataclasses.replace(
        config, targets=tuple(differences), fused="whole", exclude=(), layers=None, rank_pattern={}
    )
    sites = [site for site in find_sites(model, config) if site.name in differences]
    config = dataclasses.replace(config, dtype="float32")
    basis = basis_of(config, {site.name: site.shape for site in sites})
    d, b, report = {}, {}, []
    for site in sites:
        A, B = _matrices(basis, site.name, *site.shape, site.rank)
        target = differences[site.name]
        if (target.left.shape[0], target.right.shape[1]) != site.shape:
            raise ConfigError(
                f"layer '{site.name}' is {site.shape[1]} -> {site.shape[0]} in the model and "
                f"{target.right.shape[1]} -> {target.left.shape[0]} in the difference"
            )
        d_fit, b_fit, error = fit_vectors(target, A, B, config.start_d)
        d[site.name], b[site.name] = d_fit.float(), b_fit.float()
        report.append(LayerError(site.name, site.rank, target.norm, error))
    adapter = Adapter(
        config=config,
        shapes={site.name: site.shape for site in sites},
        d=d,
        b=b,
        base_id=base_id(model),
        kernels={site.name: site.part.kernel for site in sites if site.part.kernel},
        layer_ranks={site.name: site.rank for site in sites},
    )
    return adapter, report


def fit_vectors(
    target: Difference, A: Tensor, B: Tensor, d_size: float
) -> tuple[Tensor, Tensor, float]:
    """Fit d and b of one layer.

    Args:
        target: ΔW.
        A: Shape (r, n), float64.
        B: Shape (m, r), float64, with the scale s in it.
        d_size: The root mean square that d gets; b takes the rest of the scale.

    Returns:
        d (r,), b (m,) and the relative error |diag(b) B diag(d) A - ΔW| / |ΔW|.
    """
    gram = A @ A.T
    product = target.left @ (target.right @ A.T)  # ΔW Aᵀ
    norm = target.norm
    if not norm:
        return torch.full((A.shape[0],), d_size).double(), torch.zeros(B.shape[0]).double(), 0.0
    X = product @ torch.linalg.pinv(gram, hermitian=True)
    fits = [_alternate(start, B, gram, product, norm) for start in _starts(X, B)]
    d, b, error = min(fits, key=lambda fit: fit[2])
    size = float(d.square().mean().sqrt())
    if size:
        d, b = d * (d_size / size), b * (size / d_size)
    return d, b, error


def _alternate(
    d: Tensor, B: Tensor, gram: Tensor, product: Tensor, norm: float
) -> tuple[Tensor, Tensor, float]:
    """d, b and the relative error after alternating steps from a d."""
    b = _best_b(B * d, gram, product)
    for _ in range(_STEPS):
        d = _best_d(B * b[:, None], gram, product)
        b = _best_b(B * d, gram, product)
    M = b[:, None] * B * d
    squared = norm**2 - 2 * float((M * product).sum()) + float(((M @ gram) * M).sum())
    return d, b, math.sqrt(max(squared, 0.0)) / norm


def _best_b(M: Tensor, gram: Tensor, product: Tensor) -> Tensor:
    """The b of least error, where ΔW is diag(b) M A."""
    length = ((M @ gram) * M).sum(1)
    return torch.where(length > 0, (M * product).sum(1) / length.clamp_min(1e-300), 0.0)


def _best_d(M: Tensor, gram: Tensor, product: Tensor) -> Tensor:
    """The d of least error, where ΔW is M diag(d) A."""
    system = (M.T @ M) * gram
    return torch.linalg.lstsq(system, (M * product).sum(0)[:, None], driver="gelsd").solution[:, 0]


def _starts(X: Tensor, B: Tensor) -> list[Tensor]:
    """Two first guesses of d: the strongest right singular vector of X / B, and of X * |B| / B.

    The first is exact where ΔW is a VeRA; the second ignores entries where B is small.
    """
    ratio = torch.where(B != 0, X / B, 0.0)
    return [
        torch.linalg.svd(matrix, full_matrices=False)[2][0] for matrix in (ratio, ratio * B.abs())
    ]


def _matrices(basis: Basis, layer: str, m: int, n: int, rank: int) -> tuple[Tensor, Tensor]:
    """A and s B of a layer in float64."""
    A, B = (dense(x).double() for x in basis.pair(layer, m, n, rank, _CPU, torch.float32))
    return A, B * basis.scale(rank, n)


def as_difference(pair: LoraPair) -> Difference:
    """ΔW of a LoRA pair."""
    return Difference(pair.B.double(), pair.A.double())
