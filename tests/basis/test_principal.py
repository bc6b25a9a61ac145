import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veratune.basis.directions import LayerDirections, principal_directions
from veratune.basis.principal import PrincipalBasis
from veratune.errors import BasisError

CPU = torch.device("cpu")


def matrix_of(singular, m=40, n=30, seed=0):
    """A matrix with these singular values and random directions: (W, U, V)."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(size, len(singular), generator=generator).double()).Q
        for size in (m, n)
    )
    return u * torch.tensor(singular, dtype=torch.float64) @ v.T, u, v


def delta(u, v):
    """ΔW with another d at every direction: what a trained adapter depends on."""
    return u * torch.cos(torch.arange(u.shape[1], dtype=torch.float64)) @ v.T


def basis_over(weights, rank=4, seed=0):
    return PrincipalBasis(
        seed, {k: LayerDirections(k, lambda w=w: w, rank, seed) for k, w in weights.items()}
    )


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(4, 40), n=st.integers(4, 40), part=st.floats(0.1, 1.0), seed=st.integers(0, 2**32)
)
def test_the_directions_are_numpys_where_the_spectrum_falls(m, n, part, seed):
    most = min(m, n)
    rank = max(1, round(part * most))
    W, _, _ = matrix_of([0.7**i + 1e-3 for i in range(most)], m, n, seed % 1000)
    u, s, v = principal_directions(W, rank, seed)
    left, values, right = np.linalg.svd(W.numpy())
    assert np.allclose(s, values[:rank], rtol=1e-6)
    assert np.allclose((u * s) @ v.T, left[:, :rank] * values[:rank] @ right[:rank], atol=1e-5)
    for found in (u, v):
        assert torch.allclose(found.T @ found, torch.eye(rank, dtype=torch.float64), atol=1e-10)
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize(
    "singular",
    [
        [5.0, 3.0, 3.0, 3.0, 1.0, 0.5],  # equal, and the cut is inside
        [2.0] * 6,
        [5.0, 3.0, 3.0 - 1e-9, 2.0, 1.0, 0.5],
        [5.0, 3.0, 3.0 - 1e-5, 2.0, 1.0, 0.5],
    ],
)
def test_near_equal_singular_values_survive_another_machines_rounding(singular):
    W, _, _ = matrix_of(singular)
    noise = 1e-14 * torch.randn(W.shape, generator=torch.Generator().manual_seed(1)).double()
    one, two = (principal_directions(w, 3, 0) for w in (W, W + noise))
    assert torch.allclose(delta(one[0], one[2]), delta(two[0], two[2]), atol=1e-5)


def test_the_directions_do_not_depend_on_the_number_of_threads():
    code = (
        "import torch; torch.set_num_threads({});"
        "from veratune.basis.directions import principal_directions as p;"
        "w = torch.randn(300, 200, generator=torch.Generator().manual_seed(0));"
        "u, s, v = p(w, 24, 0); print(' '.join(f'{{x:.9f}}' for x in (u * s @ v.T)[::40, ::40].flatten().tolist()))"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code.format(n)], capture_output=True, text=True, check=True
        )
        for n in (1, 2)
    ]
    one, two = (np.array(run.stdout.split(), dtype=float) for run in found)
    assert np.abs(one - two).max() < 1e-5


def test_a_pair_has_the_scale_and_shape_of_its_layer():
    W, _, _ = matrix_of([3.0, 2.0, 1.0, 0.5, 0.2])
    basis = basis_over({"x": W}, rank=2)
    A, B = basis.pair("x", 40, 30, 2, CPU, torch.float32)
    assert (A.shape, B.shape) == ((2, 30), (40, 2))
    assert torch.allclose(A @ A.T, torch.eye(2), atol=1e-6)
    assert torch.allclose(B.T @ B, 4 * 40 / 2 * torch.eye(2), atol=1e-4)
    assert basis.pair("x", 40, 30, 2, CPU, torch.float32)[0] is A  # one copy for all adapters
    assert basis.allocated_bytes() == 4 * (2 * 30 + 40 * 2)


def test_other_weights_have_another_fingerprint_and_rounding_has_not():
    weights = {f"{i}": matrix_of([3.0, 2.0, 1.0, 0.5], seed=i)[0] for i in range(12)}
    basis, same = basis_over(weights), basis_over({k: w * (1 + 1e-7) for k, w in weights.items()})
    assert basis.matches(basis.fingerprint())
    assert basis.matches(same.fingerprint())
    assert not basis.matches(basis_over(weights, rank=3).fingerprint())
    other = basis_over(weights | {"0": matrix_of([3.0, 2.0, 1.0, 0.5], seed=99)[0]})
    assert not basis.matches(other.fingerprint())
    swapped = basis_over(
        {k: matrix_of([2.0, 3.0, 1.0, 0.5], seed=i)[0] for i, k in enumerate(weights)}
    )
    assert not basis.matches(swapped.fingerprint())
    for junk in ("", "principal:", "principal:####", "principal:AAAA", "0" * 32):
        assert not basis.matches(junk)


@pytest.mark.parametrize(
    ("weight", "rank", "message"),
    [
        (
            torch.eye(3, 5),
            4,
            r"rank is 4, but a weight of shape \(3, 5\) has 3 principal directions",
        ),
        (torch.zeros(4, 4), 1, "its weight has 0 principal directions, but rank is 1"),
        (torch.ones(4, 4), 2, "its weight has 1 principal directions, but rank is 2"),
        (torch.full((4, 4), torch.nan), 2, "its weight holds NaN or infinity"),
    ],
)
def test_weights_without_so_many_directions_are_refused(weight, rank, message):
    with pytest.raises(BasisError, match=f"layer 'x': {message}"):
        basis_over({"x": weight}, rank).pair("x", *weight.shape, rank, CPU, torch.float32)


def test_without_weights_there_is_nothing_to_compute():
    with pytest.raises(BasisError, match="needs the base model's weights"):
        LayerDirections("x", None, 2, 0).pair(CPU, torch.float32)
