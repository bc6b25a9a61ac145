import numpy as np
import pytest
from scipy import stats

from veratune.basis.distributions import gain, values

BITS = np.random.default_rng(0).integers(0, 2**32, 400_000, dtype=np.uint32)
EDGES = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)


def test_normal_is_the_inverse_of_the_distribution_function():
    bits = np.concatenate([BITS, EDGES])
    wanted = stats.norm.ppf((bits + 0.5) * 2.0**-32)
    np.testing.assert_allclose(values(bits, "kaiming_normal"), wanted, rtol=1e-7)


@pytest.mark.parametrize(
    ("init", "distribution"),
    [
        ("kaiming_uniform", stats.uniform(-1, 2)),
        ("kaiming_normal", stats.norm),
        ("uniform", stats.uniform(0, 1)),
    ],
)
def test_values_follow_their_distribution(init, distribution):
    assert stats.kstest(values(BITS, init), distribution.cdf).pvalue > 0.01


def test_bounds():
    assert values(EDGES, "kaiming_uniform").min() == -1.0
    assert values(EDGES, "kaiming_uniform").max() < 1.0
    assert values(EDGES, "uniform").min() == 0.0
    assert values(EDGES, "uniform").max() < 1.0


def test_gains_are_those_of_torch():
    import torch

    n = 3000
    weight = torch.empty(200, n)
    torch.nn.init.kaiming_uniform_(weight)
    assert weight.abs().max().item() == pytest.approx(gain("kaiming_uniform", n), rel=1e-3)
    torch.nn.init.kaiming_normal_(weight)
    assert weight.std().item() == pytest.approx(gain("kaiming_normal", n), rel=1e-2)
    assert gain("uniform", n) == 0.1
