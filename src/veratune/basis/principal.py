"""PrincipalBasis: A and B from the leading singular directions of a layer's own frozen weight."""

import base64
import functools
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from veratune.basis.basis import Basis
from veratune.basis.directions import LayerDirections, start_matrix
from veratune.errors import BasisError

_SAMPLED_LAYERS = 8  # of a fingerprint
_SAMPLES = 8  # numbers for each of them
_TOLERANCE = 1e-3  # of a fingerprint's numbers, relative to their root mean square
_PREFIX = "principal:"


class PrincipalBasis(Basis):
    """ΔW = 2 sqrt(m / r) U_r diag(d) V_rᵀ, where W = U diag(s) Vᵀ is the layer's frozen weight.

    A = V_rᵀ (r, n) and B = 2 sqrt(m / r) U_r (m, r) are recomputed from the weights of the base
    model, never stored. They do not depend on the number of threads, and agree to 1e-5 between
    machines. The directions of each layer are computed on first use. Bases that have the
    `LayerDirections` of a layer in common share one copy of its A and B.

    Args:
        seed: Seed of the start of the subspace iteration.
        layers: The directions of each layer.

    Source: singular vectors with a trained diagonal, as in SVFT (arXiv 2405.19597).
    """

    def __init__(self, seed: int, layers: Mapping[str, LayerDirections]) -> None:
        super().__init__()
        self.seed, self.layers = seed, dict(layers)

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
        kind, _, layer = role.partition("/")
        held = self.layers[layer].pair(device, dtype)["AB".index(kind)]
        if held.shape != (rows, columns):
            raise BasisError(
                f"layer '{layer}': the principal directions are {tuple(held.shape)}, "
                f"({rows}, {columns}) is wanted; attach the adapter anew"
            )
        return held

    def generate(self, role: str, out: Tensor) -> None:
        rows, columns = out.shape
        out.copy_(self.matrix(role, rows, columns, torch.device("cpu"), out.dtype))

    def tensors(self) -> list[Tensor]:
        """All matrices in memory, shared ones too."""
        shared = [tensor for layer in self.layers.values() for tensor in layer.tensors()]
        return super().tensors() + shared

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

    @functools.cached_property
    def _numbers(self) -> np.ndarray:
        """Numbers of the fingerprint: samples of layers spread evenly over all, by name."""
        cpu = torch.device("cpu")
        pairs = [self.layers[layer].pair(cpu, torch.float32) for layer in self._sampled]
        return np.concatenate([_sample(A.double(), B.double(), self.seed) for A, B in pairs])

    @functools.cached_property
    def _sampled(self) -> tuple[str, ...]:
        names = sorted(self.layers)
        places = np.linspace(0, len(names) - 1, min(len(names), _SAMPLED_LAYERS))
        return tuple(dict.fromkeys(names[int(place)] for place in places))


def _sample(A: Tensor, B: Tensor, seed: int) -> np.ndarray:
    """Entries of P B diag(g) A Q, with P, Q random and every g_i another: joint signs cancel."""
    left = start_matrix(seed + 1, B.shape[0], _SAMPLES) / math.sqrt(B.shape[0])
    right = start_matrix(seed + 2, A.shape[1], _SAMPLES) / math.sqrt(A.shape[1])
    weights = torch.cos(torch.arange(1, len(A) + 1, dtype=torch.float64))
    return ((left.T @ B) * weights * (A @ right).T).sum(1).numpy()


def blank_fingerprint(layers: int) -> str:
    """A fingerprint of the right length for so many layers, which matches no basis."""
    numbers = min(layers, _SAMPLED_LAYERS) * _SAMPLES
    return _PREFIX + base64.b64encode(np.zeros(numbers, "<f4").tobytes()).decode()
