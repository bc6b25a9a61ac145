"""Int8 storage: its error is bounded, and a second round changes nothing."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.adapter import Adapter
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


def test_sizes_of_an_adapter_of_smollm2():
    """Query and value of SmolLM2-135M at rank 256: 38,400 values."""
    sizes = {"q_proj": (576, 576), "v_proj": (192, 576)}
    shapes = {
        f"model.layers.{i}.self_attn.{name}": shape
        for i in range(30)
        for name, shape in sizes.items()
    }
    adapter = Adapter(
        vt.VeraConfig(rank=256, targets=["query", "value"]),
        shapes,
        {layer: torch.randn(256) for layer in shapes},
        {layer: torch.randn(m) for layer, (m, _) in shapes.items()},
        base_id="SmolLM2-135M-Instruct",
        weight_fingerprint=torch.zeros(64, dtype=torch.bfloat16),
        base_fingerprint=torch.zeros((211, 2), dtype=torch.int8),
        task={"name": "instruction", "columns": {}, "max_length": 128, "system": ""},
    )
    assert adapter.trained_values == 38_400
    assert len(native.encode(adapter, "float32")) < 160_000
    assert len(native.encode(adapter, "bfloat16")) < 90_000
    assert len(native.encode(adapter, "int8")) < 55_000
