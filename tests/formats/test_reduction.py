"""Rank reduction: its error is the tail of the singular values, and no rank does better."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veratune.errors import ConfigError
from veratune.formats.lora_matrices import LoraPair
from veratune.formats.reduction import padded, reduce_rank, total_error

SIZES = st.integers(1, 12)


def pair_of(m, n, r, seed):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -3, r)
    A = torch.randn(r, n, generator=generator)
    return LoraPair(A, torch.randn(m, r, generator=generator) * scales)


@given(SIZES, SIZES, st.integers(1, 8), st.integers(1, 8), st.integers(0, 999))
def test_error_is_the_tail_of_the_singular_values(m, n, r, k, seed):
    pair = pair_of(m, n, r, seed)
    out, report = reduce_rank({"x": pair}, rank=k)
    S = torch.linalg.svdvals(pair.delta().double())
    found = torch.linalg.vector_norm(out["x"].delta().double() - pair.delta().double())
    tail = torch.linalg.vector_norm(S[min(k, r) :])
    assert float((found - tail).abs()) < 1e-5 * float(S[0])
    assert abs(report[0].error - float(tail / torch.linalg.vector_norm(S))) < 1e-5
    assert out["x"].rank == (r if k >= r else min(k, m, n))


@given(SIZES, SIZES, st.integers(1, 8), st.floats(0.0, 0.9), st.integers(0, 999))
def test_tolerance_takes_the_least_rank(m, n, r, tolerance, seed):
    pair = pair_of(m, n, r, seed)
    out, report = reduce_rank({"x": pair}, tolerance=tolerance)
    assert report[0].error <= tolerance + 1e-9
    if out["x"].rank > 1 and report[0].error:
        (_, worse) = reduce_rank({"x": pair}, rank=out["x"].rank - 1)
        assert worse[0].error > tolerance - 1e-9


def test_errors_of_layers_add_up():
    pairs = {str(i): pair_of(8, 9, 4, i) for i in range(3)}
    out, report = reduce_rank(pairs, rank=2)
    lost = sum(float((out[k].delta() - pairs[k].delta()).square().sum()) for k in pairs)
    norm = sum(float(p.delta().square().sum()) for p in pairs.values())
    assert total_error(report) == pytest.approx((lost / norm) ** 0.5, rel=1e-4)


def test_padding_changes_nothing():
    pair = pair_of(5, 6, 3, 0)
    wide = padded({"x": pair}, 8)["x"]
    assert wide.rank == 8
    torch.testing.assert_close(wide.delta(), pair.delta())


def test_bad_requests():
    pairs = {"x": pair_of(8, 9, 4, 0)}
    for settings, message in (
        ({}, "give a rank or a tolerance"),
        ({"rank": 0}, "must be at least 1"),
        ({"tolerance": 1.0}, r"must be in \[0, 1\)"),
        ({"rank": 1, "tolerance": 1e-9}, "layer 'x' needs rank 4 .* 1 is the limit"),
    ):
        with pytest.raises(ConfigError, match=message):
            reduce_rank(pairs, **settings)
