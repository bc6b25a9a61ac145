import copy
import gc
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.vera.model import _kaiming_init

from veratune.basis.basis import PeftBasis, RandomBasis, basis_of
from veratune.config import VeraConfig

CPU = torch.device("cpu")


def pair(basis, m, n, r, layer="x", dtype=torch.float32):
    return basis.pair(layer, m, n, r, CPU, dtype)


# These values are the format: an adapter on disk means nothing if one of them changes.
@pytest.mark.parametrize(
    ("seed", "init", "sharing", "golden"),
    [
        (0, "kaiming_uniform", "shared", "4ebd624b7498e3b2d04e026e0549d92c"),
        (0, "kaiming_normal", "shared", "ea7db8fb89d8110e9d0da858ad8cf5f1"),
        (0, "uniform", "shared", "7f099ce542effc39351b610abcce7f4c"),
        (2**64 - 1, "kaiming_uniform", "per_shape", "b467e97ba5275d883bc258e06bd63726"),
        (7, "kaiming_uniform", "unique", "9823fa14008bca14426d2c955d7091d1"),
    ],
)
def test_golden_fingerprints(seed, init, sharing, golden):
    assert RandomBasis(seed, init, sharing).fingerprint() == golden


def test_golden_values():
    A, B = pair(RandomBasis(0, "kaiming_uniform", "shared"), 2, 3, 2)
    assert A.contiguous().view(torch.int32).tolist() == [
        [1014367104, 1030287392, -1087508528],
        [1057878794, -1091196840, 1053729592],
    ]
    assert B.contiguous().view(torch.int32).tolist() == [
        [1059359176, -1086948100],
        [1055712156, -1085573336],
    ]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**64 - 1), st.sampled_from(["kaiming_uniform", "kaiming_normal", "uniform"]),
    st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=4),
)  # fmt: skip
def test_no_other_layer_changes_a_value(seed, init, shapes):
    shared = RandomBasis(seed, init, "shared")
    for m, n, r in shapes:  # grows, cuts, grows again
        A, B = pair(shared, m, n, r)
        alone_A, alone_B = pair(RandomBasis(seed, init, "shared"), m, n, r)
        assert A.shape == (r, n)
        assert B.shape == (m, r)
        assert torch.equal(A, alone_A)
        assert torch.equal(B, alone_B)


def test_a_cast_is_a_rounding_of_the_same_values():
    basis = RandomBasis(3, "kaiming_uniform", "shared")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(
            pair(basis, 9, 33, 8, dtype=dtype)[0], pair(basis, 9, 33, 8)[0].to(dtype)
        )


def test_sharing():
    shared, per_shape, unique = (
        RandomBasis(0, "kaiming_uniform", s) for s in ("shared", "per_shape", "unique")
    )
    assert torch.equal(pair(shared, 8, 8, 4, "x")[0], pair(shared, 8, 8, 4, "y")[0])
    assert torch.equal(pair(shared, 8, 8, 4)[0], pair(shared, 16, 8, 4)[0])
    assert torch.equal(pair(per_shape, 8, 8, 4, "x")[0], pair(per_shape, 8, 8, 4, "y")[0])
    assert not torch.equal(pair(per_shape, 8, 8, 4)[0], pair(per_shape, 16, 8, 4)[0])
    assert not torch.equal(pair(unique, 8, 8, 4, "x")[0], pair(unique, 8, 8, 4, "y")[0])


def test_one_copy_for_all_ranks_layers_and_threads():
    basis = RandomBasis(0, "kaiming_uniform", "shared")
    basis.reserve([("a", 64, 32, 16), ("b", 16, 128, 8)], CPU, torch.float32)
    threads = [threading.Thread(target=pair, args=(basis, 64, 128, 16)) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert basis.allocated_bytes() == 4 * (16 * 128 + 64 * 16)
    assert pair(basis, 8, 8, 4)[0].data_ptr() == pair(basis, 64, 128, 16)[0].data_ptr()
    assert copy.deepcopy(basis) is basis


def test_adapters_with_one_seed_share_and_others_do_not():
    one, two, other = (
        basis_of(VeraConfig(rank=r, seed=s), {}) for r, s in ((8, 5), (16, 5), (8, 6))
    )
    assert one is two
    assert one is not other
    del one, two, other
    gc.collect()
    assert (
        basis_of(VeraConfig(seed=5), {}).allocated_bytes() == 0
    )  # freed with the last that used it


@pytest.mark.parametrize(
    ("seed", "r", "n", "m"), [(0, 256, 768, 768), (5, 16, 70, 91), (123456789, 3, 1, 1)]
)
def test_peft_basis_is_bit_identical_to_pefts(seed, r, n, m):
    generator = torch.Generator(device="cpu").manual_seed(seed)
    A, B = _kaiming_init((r, n), generator=generator), _kaiming_init((m, r), generator=generator)
    own_A, own_B = pair(PeftBasis(seed, r, n, m), m, n, r)
    assert torch.equal(A, own_A)
    assert torch.equal(B, own_B)


def test_peft_basis_takes_its_size_from_all_layers():
    basis = basis_of(VeraConfig(basis="peft", rank=4), {"a": (8, 16), "b": (32, 4)})
    assert (basis.max_out, basis.max_in) == (32, 16)
    assert (
        basis.fingerprint()
        != basis_of(VeraConfig(basis="peft", rank=4), {"a": (8, 16)}).fingerprint()
    )
