"""Tenants with a principal basis: in one batch with others, one copy of A and B, refused on another base."""

import dataclasses
import gc

import pytest
import torch

import veratune as vt
from tests import fakes
from tests.serving.fakes import QV, adapter, encode_alone, encoder, engine, generate_alone, run_all
from tests.serving.fakes import small_llama as llama
from veratune.basis import directions
from veratune.errors import BasisError, UnsupportedError
from veratune.formats import native
from veratune.serving.engine.encoder import EncodeRequest
from veratune.serving.engine.requests import GenerationRequest
from veratune.serving.engine.sampling import SamplingParams
from veratune.serving.pool.pool import AdapterPool

SMALL = vt.VeraConfig(rank=4, targets=("query", "value"), vectors="d", basis="principal")
WIDE = vt.VeraConfig(rank=4, targets=("all-linear",), vectors="d", basis="principal")


def stored(make, config, number):
    """An adapter as it comes out of its file, without A and B."""
    return native.decode(native.encode(adapter(make, config, number)))


def test_concurrent_completions_of_principal_and_random_tenants_are_those_of_each_alone():
    own = [stored(llama, config, i) for i, config in enumerate((SMALL, QV, SMALL, WIDE))] + [None]
    made = engine(llama)
    made.eos_token_ids = set()
    prompts = [[5, 6, 7, 8], [9, 10]]
    requests, wanted = [], []
    for number, tenant in enumerate(own):
        for prompt in prompts:
            requests.append(
                GenerationRequest(
                    f"t{number}",
                    key=None if tenant is None else number,
                    load=lambda tenant=tenant: tenant,
                    tokens=prompt,
                    sampling=SamplingParams(temperature=0, max_tokens=8),
                )
            )
            wanted.append(generate_alone(llama, prompt, tenant, 8))
    tokens, _ = run_all(made, requests)
    made.close()
    assert tokens == wanted
    assert len({tuple(ids) for ids in wanted[:: len(prompts)]}) > 2  # or the test could not fail


def test_an_encoder_gives_each_tenant_its_own_embedding():
    own = [stored(lambda: fakes.bert(2), config, i) for i, config in enumerate((SMALL, QV))]
    made = encoder()
    requests = [
        EncodeRequest(
            f"t{i}", key=i, load=lambda tenant=tenant: tenant, encoded=made.encode("good film")
        )
        for i, tenant in enumerate(own)
    ]
    made.start()
    for request in requests:
        made.submit(request)
    for request, tenant in zip(requests, own, strict=True):
        wanted = encode_alone(tenant, "good film", "embedding")
        torch.testing.assert_close(torch.tensor(request.result()), wanted, atol=1e-5, rtol=1e-4)
    made.close()


def test_tenants_with_some_layers_in_common_share_their_copy(monkeypatch):
    pool = AdapterPool(llama().eval(), slots=4)
    one, two, other = (stored(llama, config, 0) for config in (SMALL, WIDE, dataclasses.replace(SMALL, rank=3)))  # fmt: skip
    calls, real = [], directions.principal_directions
    monkeypatch.setattr(
        directions, "principal_directions", lambda *args: calls.append(args) or real(*args)
    )
    pool.acquire("wide", lambda: two)
    assert len(calls) == len(two.shapes)
    alone = pool.frozen_bytes
    pool.acquire("narrow", lambda: one)
    pool.acquire("narrow too", lambda: one)
    assert len(calls) == len(two.shapes)  # nothing is computed for layers that are there
    assert pool.frozen_bytes == alone  # nor held twice
    pool.acquire("other rank", lambda: other)
    assert len(calls) == len(two.shapes) + len(one.shapes)
    assert pool.frozen_bytes > alone


def test_a_file_of_other_directions_is_refused_at_the_upload():
    made = adapter(llama, SMALL, 0)
    model = llama()
    last = max(made.shapes).partition(":")[0]
    with torch.no_grad():
        weight = model.get_submodule(last).weight
        weight.copy_(weight.flip(0))
    pool = AdapterPool(model.eval(), slots=2)
    file = dataclasses.replace(made, bound=None, weight_fingerprint=None, base_fingerprint=None)
    for call in (lambda: pool.check(file), lambda: pool.acquire("x", lambda: file)):
        with pytest.raises(BasisError, match="their fingerprints differ"):
            call()
    assert len(pool) == 0


def test_size_is_checked_before_any_direction_is_computed(monkeypatch):
    pool = AdapterPool(llama().eval(), slots=2, max_bytes=1000)
    file = stored(llama, WIDE, 0)
    monkeypatch.setattr(directions, "principal_directions", None)  # a call would fail
    for call in (lambda: pool.check(file), lambda: pool.acquire("x", lambda: file)):
        with pytest.raises(UnsupportedError, match="adapters have 1,000 here"):
            call()
    gc.collect()
    assert pool.frozen_bytes == 0


def test_adapters_of_convolutions_are_refused_at_the_upload():
    def make():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))

    made = adapter(make, vt.VeraConfig(rank=2, targets=("all-conv",)), 0)
    with pytest.raises(UnsupportedError, match="is a convolution"):
        AdapterPool(make(), slots=1).check(made)
