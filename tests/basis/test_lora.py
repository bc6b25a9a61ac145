import pytest
import torch

from veratune.basis.lora import LoraBasis
from veratune.errors import ShapeError


def pairs(seed=0, rank=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": (torch.randn(rank, 5, generator=generator), torch.randn(4, rank, generator=generator))
    }


def test_it_gives_the_matrices_back_and_knows_them_by_their_bits():
    basis = LoraBasis(pairs())
    A, B = basis.pair("a", 4, 5, 3, torch.device("cpu"), torch.float32)
    assert torch.equal(A, pairs()["a"][0])
    assert torch.equal(B, pairs()["a"][1])
    assert basis.scale(3, 5) == 1.0
    assert basis.ranks() == {"a": 3}
    assert basis.fingerprint() == LoraBasis(pairs()).fingerprint()
    assert basis.fingerprint() != LoraBasis(pairs(1)).fingerprint()
    with pytest.raises(ShapeError, match=r"layer 'a': A \(3, 5\) and B \(4, 2\) are no"):
        LoraBasis({"a": (pairs()["a"][0], torch.ones(4, 2))})
