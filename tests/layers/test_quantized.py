"""bitsandbytes' 4-bit and 8-bit linears on a CPU: exact beside their own base, trained through, never merged."""

import copy

import pytest
import torch
from torch import nn

import veratune as vt
from tests.fakes import scramble
from veratune.errors import UnsupportedError

bnb = pytest.importorskip("bitsandbytes")


def build(bits):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32)).eval()
    quantized = copy.deepcopy(dense)
    for name, layer in dense.named_children():
        if isinstance(layer, nn.Linear):
            n, m = layer.in_features, layer.out_features
            made = (
                bnb.nn.Linear4bit(n, m, quant_type="nf4")
                if bits == 4
                else bnb.nn.Linear8bitLt(n, m, has_fp16_weights=False)
            )
            made.load_state_dict(layer.state_dict())
            setattr(quantized, name, made)
    return dense, quantized.to("cpu").requires_grad_(False)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_adapter_is_exact_over_the_quantized_base(bits):
    _, model = build(bits)
    x = torch.randn(4, 64)
    plain = [model[0](x), model(x)]
    vt.attach(model, vt.VeraConfig(rank=16, targets="all-linear"), "a")
    assert torch.equal(model(x), plain[1])
    scramble(model, "a")
    v = model[0].vectors("a")[0]
    torch.testing.assert_close(
        model[0](x), plain[0] + x @ v.delta_weight(x.device, torch.float32).T, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_principal_directions_are_those_of_the_dequantized_weight(bits):
    dense, model = build(bits)
    vt.attach(model, vt.VeraConfig(rank=4, targets=["0"], vectors="d", basis="principal"), "a")
    x = torch.randn(4, 64)
    A, B = model[0].vectors("a")[0].pair(x.device, torch.float32)
    # A leading direction keeps most of its singular value under quantization.
    kept = torch.einsum("mr,mn,rn->r", B, dense[0].weight.detach(), A) / B.norm(dim=0)
    assert (kept > 0.5 * torch.linalg.svdvals(dense[0].weight.detach())[0]).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_training_goes_through(bits):
    _, model = build(bits)
    vt.attach(model, vt.VeraConfig(rank=32, targets="all-linear"), "a")
    x, target = torch.randn(16, 64), torch.randn(16, 32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_merging_is_refused_with_the_reason(bits):
    _, model = build(bits)
    vt.attach(model, vt.VeraConfig(rank=8, targets="all-linear"), "a")
    with pytest.raises(
        UnsupportedError,
        match=r"layer '0' stores its weight as Params4bit|layer '0' stores its weight as Int8Params",
    ):
        vt.merge(model)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_of_the_dense_base_loads_over_the_quantized_one(bits, tmp_path):
    dense, model = build(bits)
    vt.attach(dense, vt.VeraConfig(rank=16, targets="all-linear"), "a")
    scramble(dense, "a")
    vt.save(dense, tmp_path / "a.safetensors")
    vt.load(model, tmp_path / "a.safetensors")
    x = torch.randn(64, 64)
    assert torch.cosine_similarity(model(x).flatten(), dense(x).flatten(), dim=0) > 0.98
