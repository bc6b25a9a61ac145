"""Int8 storage: its error is bounded, and a second round changes nothing."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.formats import native
from veratune.formats.int8 import BLOCK, block_count, dequantize, quantize


@given(st.integers(1, 300), st.floats(1e-6, 1e6), st.integers(0, 99))
def test_error_is_half_a_step_and_a_second_round_is_exact(size, scale, seed):
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale
    codes, scales = quantize(values)
    assert scales.shape == (block_count(size),)
    read = dequantize(codes, scales)
    steps = scales.float().repeat_interleave(BLOCK)[:size]
    assert ((read - values).abs() <= 0.8 * steps).all()
    again = quantize(read)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)


def test_zeros_stay_zeros():
    assert torch.equal(dequantize(*quantize(torch.zeros(70))), torch.zeros(70))


def test_a_file_of_int8_is_small_and_reads_as_the_configs_dtype():
    model = scramble(vt.attach(fakes.llama(), vt.VeraConfig(rank=64), "a"), "a")
    adapter = vt.extract(model)
    data = native.encode(adapter, "int8")
    read = native.decode(data)
    assert read.config == adapter.config
    assert native.encode(read, "int8") == data
    assert len(native.encode(adapter)) - len(data) > 2.5 * adapter.trained_values
    for layer, vector in adapter.d.items():
        assert read.d[layer].dtype == torch.float32
        assert (read.d[layer] - vector).abs().max() < vector.abs().max() / 100
