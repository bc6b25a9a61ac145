"""LoraBasis: A and B of a trained LoRA, frozen, under vectors d and b that start at one."""

import hashlib
from collections.abc import Mapping

from torch import Tensor

from veratune.basis.basis import Basis
from veratune.errors import ShapeError


class LoraBasis(Basis):
    """ΔW = diag(b) B diag(d) A with A (r, n) and B (m, r) of a LoRA, by layer; at d = b = 1 it is
    that LoRA.

    pairs: (A, B) by the layer's path, its factor alpha / r multiplied into B. Layers may have
    different ranks. Many pairs of vectors may be trained over one LoRA: each is an adapter of
    kilobytes. Raises ShapeError where a pair does not multiply. Source of the idea: "VeRA on
    Images", its conclusion.
    """

    def __init__(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        for layer, (A, B) in pairs.items():
            if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
                raise ShapeError(
                    f"layer '{layer}': A {tuple(A.shape)} and B {tuple(B.shape)} are no (r, n) and "
                    "(m, r) of one rank"
                )
        self.pairs = {
            layer: (A.detach().cpu(), B.detach().cpu()) for layer, (A, B) in pairs.items()
        }

    def ranks(self) -> dict[str, int]:
        """R of each layer."""
        return {layer: A.shape[0] for layer, (A, _) in self.pairs.items()}

    def roles(self, layer: str, out_features: int, in_features: int) -> tuple[str, str]:
        return f"A/{layer}", f"B/{layer}"

    def scale(self, rank: int, in_features: int) -> float:
        return 1.0

    def generate(self, role: str, out: Tensor) -> None:
        kind, _, layer = role.partition("/")
        out.copy_(self.pairs[layer]["AB".index(kind)])

    def fingerprint(self) -> str:
        digest = hashlib.sha256(b"lora")
        for layer in sorted(self.pairs):
            for matrix in self.pairs[layer]:
                digest.update(f"\0{layer}\0{list(matrix.shape)}\0".encode())
                digest.update(matrix.float().contiguous().numpy().astype("<f4").tobytes())
        return digest.hexdigest()[:32]
