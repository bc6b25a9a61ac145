"""Linear layers on few rows: the product in the other order, and only where that is faster."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from veratune.ops.few_rows import linear, takes_rows_as_columns

SIZES = st.integers(1, 40)


@given(st.integers(0, 40), SIZES, SIZES, st.booleans(), st.integers(0, 2**31))
def test_it_equals_torch_for_every_size(rows, m, n, has_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(k, n, generator=generator) for k in (rows, m))
    bias = torch.randn(m, generator=generator) if has_bias else None
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    y = linear(x, weight, bias)
    assert y.is_contiguous()
    assert torch.allclose(y.double(), wanted, atol=1e-5)


def test_rows_of_sequences_and_transposed_inputs():
    weight, x = torch.randn(64, 8), torch.randn(8, 1, 3).transpose(0, 2)
    assert takes_rows_as_columns(3, 64, 8)
    assert torch.allclose(linear(x, weight), F.linear(x, weight), atol=1e-5)
    x = torch.randn(2, 2, 8)
    assert torch.allclose(linear(x, weight), F.linear(x, weight), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_autocast_are_left_to_torch(monkeypatch, dtype):
    monkeypatch.setattr(torch, "mm", None)
    weight, x = torch.randn(64, 8, dtype=dtype), torch.randn(3, 8, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.float(), weight.float()).dtype == torch.bfloat16


def test_one_row_many_rows_and_narrow_layers_are_left_to_torch():
    assert not takes_rows_as_columns(1, 49152, 576)
    assert not takes_rows_as_columns(33, 49152, 576)
    assert not takes_rows_as_columns(9, 1536, 576)
    assert not takes_rows_as_columns(2, 576, 1536)
    assert takes_rows_as_columns(32, 49152, 576)
