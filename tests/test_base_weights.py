"""The principal basis of a model: layers in four parts, files, rows, pools and exports."""

import copy
import dataclasses
import gc
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.adapter import bind, extract
from veratune.basis.principal import PrincipalBasis
from veratune.errors import BaseModelError, BasisError, ConfigError, UnsupportedError
from veratune.formats import native
from veratune.formats.lora_matrices import lora_pairs
from veratune.model_state import vectors_of
from veratune.serving.pool.pool import AdapterPool

RANK = 3
LAYERS = {
    "linear": (lambda: nn.Linear(12, 16), (2, 12)),
    "conv1d": (lambda: Conv1D(16, 12), (2, 12)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
}


def falling(weight):
    """The same tensor with falling singular values, seen as a matrix of its first axis."""
    u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    return (u * 0.5 ** torch.arange(len(s)) @ v).view_as(weight)


def build(kind, **settings):
    torch.manual_seed(0)
    layer, shape = LAYERS[kind][0](), LAYERS[kind][1]
    with torch.no_grad():
        layer.weight.copy_(falling(layer.weight))
    model = nn.Sequential(layer).double()
    x = torch.randn(shape, dtype=torch.float64)
    bare = model(x)
    targets = ["0"] if "conv" not in kind or kind == "conv1d" else ["all-conv"]
    config = {"rank": RANK, "targets": targets, "vectors": "d", "basis": "principal", **settings}
    return vt.attach(model, vt.VeraConfig(**config), "a"), x, bare


def matrix(layer):
    """W (m, n) of a layer, in numpy."""
    weight = layer.weight.detach()
    if isinstance(layer, Conv1D):
        weight = weight.T
    elif isinstance(layer, nn.ConvTranspose2d):
        weight = torch.cat([part.transpose(0, 1) for part in weight.chunk(layer.groups)])
    return weight.flatten(1).numpy()


@pytest.mark.parametrize("kind", LAYERS)
def test_equals_the_singular_vectors_of_numpy(kind):
    model, _, _ = build(kind)
    (vectors,) = vectors_of(model, "a")
    with torch.no_grad():
        vectors.d.copy_(torch.tensor([0.5, -1.0, 2.0]))
    W = matrix(model[0].base)
    u, _, vt_ = np.linalg.svd(W)
    wanted = 2 * math.sqrt(len(W) / RANK) * (u[:, :RANK] * [0.5, -1.0, 2.0]) @ vt_[:RANK]
    found = vectors.delta_weight(torch.device("cpu"), torch.float64).detach().numpy()
    assert np.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_equals_its_own_merged_form_and_is_the_identity_at_the_start(kind):
    model, x, bare = build(kind)
    assert torch.equal(model(x), bare)
    y = scramble(model, "a")(x)
    assert not torch.allclose(y, bare)
    vt.merge(model)
    torch.testing.assert_close(model(x), y)
    vt.unmerge(model)
    torch.testing.assert_close(model(x), y)


def test_bad_input_is_refused_by_name():
    with pytest.raises(BasisError, match="layer '0': rank is 13, but a weight of shape"):
        build("linear", rank=13)
    with pytest.raises(ConfigError, match="takes its matrices from the base model's weights"):
        vt.VeraConfig(basis="principal", init="uniform")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 4))
    vt.attach(empty, vt.VeraConfig(rank=2, targets=["0"], basis="principal"))  # counting
    with pytest.raises(BasisError, match="cannot be read here"):
        vectors_of(empty, "default")[0].basis.fingerprint()


def gpt2(seed=0):
    return fakes.gpt2() if not seed else scrambled(fakes.gpt2(), seed)


def scrambled(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def tenant(seed, make=gpt2):
    """A trained adapter of query and value, in its model and out of it."""
    model = make()
    config = vt.VeraConfig(rank=4, vectors="d", basis="principal")
    vt.attach(model, config, "a")
    torch.manual_seed(seed)
    with torch.no_grad():
        for vectors in vectors_of(model, "a"):
            vectors.d.normal_()
    return model, extract(model)


def test_a_file_holds_d_alone_and_comes_back(tmp_path):
    model, adapter = tenant(0)
    tokens = torch.arange(16).view(2, 8) % 30
    wanted = model.eval()(tokens)[0]
    vt.save(model, tmp_path / "a.safetensors")
    again = gpt2()
    vt.load(again, tmp_path / "a.safetensors", name="b")
    torch.testing.assert_close(again.eval()(tokens)[0], wanted)
    assert adapter.trained_values == 4 * len(adapter.shapes)
    stored = native.read(tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError, match="needs its base model's weights"):
        _ = stored.basis
    with pytest.raises(BaseModelError, match="trained on another base model"):
        vt.load(gpt2(seed=1), tmp_path / "a.safetensors", name="c")
    other, last = gpt2(), max(adapter.shapes).partition(":")[0]
    with torch.no_grad():
        other.get_submodule(last).weight.copy_(other.get_submodule(last).weight.flip(0))
    with pytest.raises(BasisError, match="their fingerprints differ"):
        vt.load(other, tmp_path / "a.safetensors", name="c", check_base=False)


def test_adapters_on_one_model_share_one_copy_and_a_model_can_be_freed():
    model, one = tenant(0)
    config = vt.VeraConfig(rank=4, vectors="d", basis="principal")
    vt.attach(model, config, "b")
    bases = {id(v.basis) for name in ("a", "b") for v in vectors_of(model, name)}
    assert len(bases) == 1
    bound = bind(model, one)
    assert isinstance(bound.basis, PrincipalBasis)
    del model
    gc.collect()
    assert one.basis.allocated_bytes() > 0


@pytest.mark.parametrize("make", [fakes.bert, gpt2])
def test_exported_as_lora_it_is_the_same_change(make):
    model, adapter = tenant(0, make)
    pairs = lora_pairs(adapter, model)
    for vectors in vectors_of(model, "a"):
        rows = slice(vectors.part.start, vectors.part.stop)
        found = pairs[vectors.layer.partition(":")[0]].delta()[rows]
        wanted = vectors.delta_weight(torch.device("cpu"), torch.float32).detach()
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_an_adapted_model_can_be_pickled_and_copied():
    model, x, _ = build("linear")
    wanted = scramble(model, "a")(x)
    assert torch.equal(copy.deepcopy(model)(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), wanted)


def test_a_batch_of_tenants_computes_each_as_if_alone():
    tokens = torch.arange(16).view(2, 8) % 30
    tenants = [tenant(seed, fakes.llama) for seed in (1, 2)]
    wanted = torch.cat([own.eval()(tokens[i : i + 1])[0] for i, (own, _) in enumerate(tenants)])
    pool = AdapterPool(fakes.llama().eval(), slots=3)
    unbound = [dataclasses.replace(own, bound=None) for _, own in tenants]
    leases = [pool.acquire(i, lambda i=i: unbound[i]) for i in range(2)]
    with pool.rows(leases), torch.no_grad():
        torch.testing.assert_close(pool.model(tokens)[0], wanted, atol=1e-5, rtol=1e-5)
    one, two = (bind(pool.base_model, own) for own in unbound)
    assert one.basis is two.basis
