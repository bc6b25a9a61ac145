"""W + ΔW of the adapter that whole batches use: as exact as the factored products, bounded,
and never another adapter's.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import veratune as vt
from tests import fakes
from tests.serving.fakes import QV, adapter
from veratune.layers.few_rows import replace_linears
from veratune.serving.pool.pool import AdapterPool

TOKENS = torch.arange(40).view(5, 8) % 30
CONFIGS = {
    "query, value": QV,
    "all linear": vt.VeraConfig(rank=3, targets=("all-linear",), seed=7),
    "d alone": vt.VeraConfig(rank=6, targets=("query", "value"), vectors="d"),
    "b alone": vt.VeraConfig(rank=4, targets=("query", "value"), vectors="b"),
    "blocks": vt.VeraConfig(rank=4, targets=("query", "value"), basis="monarch"),
    "principal": vt.VeraConfig(rank=4, targets=("query", "value"), basis="principal"),
}


def outputs(pool, lease, passes=1):
    """The outputs of the last of some passes in which all rows have one adapter."""
    for _ in range(passes):
        with torch.no_grad(), pool.rows([lease] * 5):
            out = pool.model(TOKENS)[0]
    return out


def merging_pool(make, slots=4, max_merged_bytes=2**30):
    model = make().eval()
    pool = AdapterPool(model, slots=slots, max_merged_bytes=max_merged_bytes)
    replace_linears(model)
    return pool


@pytest.mark.parametrize(
    ("make", "config"),
    [(fakes.llama, config) for config in CONFIGS.values()]
    + [(make, CONFIGS[name]) for make in (fakes.bert, fakes.gpt2) for name in list(CONFIGS)[:2]],
)
def test_merged_passes_equal_factored_ones(make, config):
    own = adapter(make, config, 1)
    plain, pool = AdapterPool(make().eval(), slots=4), merging_pool(make)
    wanted = outputs(plain, plain.acquire(1, lambda: own))
    found = outputs(pool, pool.acquire(1, lambda: own), passes=12)
    assert plain.merged.bytes == 0
    layers = {site.partition(":")[0] for site in own.shapes}
    assert pool.merged.bytes > 0
    assert len(pool.merged.layers) == len(layers)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_a_pass_merges_few_layers_and_a_bound_keeps_the_rest_factored():
    own = adapter(fakes.llama, CONFIGS["all linear"], 1)
    pool = merging_pool(fakes.llama)
    lease = pool.acquire(1, lambda: own)
    wanted = outputs(pool, lease)
    assert 0 < len(pool.merged.layers) <= 4
    outputs(pool, lease, passes=6)
    whole = pool.merged.bytes
    small = merging_pool(fakes.llama, max_merged_bytes=whole // 2)
    found = outputs(small, small.acquire(1, lambda: own), passes=6)
    assert 0 < small.merged.bytes <= whole // 2
    assert torch.allclose(found, wanted, atol=1e-5)


def test_few_tokens_of_an_adapter_merge_nothing():
    own = adapter(fakes.llama, QV, 1)
    pool = merging_pool(fakes.llama)
    lease = pool.acquire(1, lambda: own)
    with torch.no_grad(), pool.rows([lease]):
        pool.model(TOKENS[:1, :1])
    assert pool.merged.bytes == 0


def test_mixed_batches_take_no_adapters_merged_weights():
    own = [adapter(fakes.llama, QV, i) for i in range(2)]
    pool = merging_pool(fakes.llama)
    leases = [pool.acquire(i, lambda i=i: own[i]) for i in range(2)]
    alone = [outputs(pool, lease) for lease in (*leases, None)]
    outputs(pool, leases[0], passes=6)
    order = [0, 1, 2, 1, 0]
    with torch.no_grad(), pool.rows([[*leases, None][i] for i in order]):
        mixed = pool.model(TOKENS)[0]
    assert torch.allclose(mixed, torch.stack([alone[i][k] for k, i in enumerate(order)]), atol=1e-5)
    bare = fakes.llama().eval()(TOKENS)[0]
    assert torch.allclose(outputs(pool, None), bare, atol=1e-5)


def test_a_short_turn_of_another_adapter_leaves_the_merged_one():
    own = [adapter(fakes.llama, QV, i) for i in range(2)]
    pool = merging_pool(fakes.llama)
    leases = [pool.acquire(i, lambda i=i: own[i]) for i in range(2)]
    outputs(pool, leases[0], passes=6)
    held = pool.merged.layers
    with torch.no_grad(), pool.rows([leases[1]]):
        pool.model(TOKENS[:1, :1])
    assert held
    assert pool.merged.layers == held
    outputs(pool, leases[1], passes=6)
    assert pool.merged.owner == (leases[1].group, leases[1].slot)


def test_half_precision_is_not_merged():
    own = adapter(fakes.llama, QV, 1)
    model = fakes.llama().bfloat16().eval()
    pool = AdapterPool(model, slots=2, max_merged_bytes=2**30)
    outputs(pool, pool.acquire(1, lambda: own), passes=6)
    assert pool.merged.bytes == 0


@settings(max_examples=6, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), max_size=6))
def test_a_slot_that_another_adapter_takes_over_never_keeps_old_weights(turns):
    own = [adapter(fakes.llama, QV, i) for i in range(6)]
    pool = merging_pool(fakes.llama, slots=2)
    wanted = {}
    for number, passes in turns:
        with pool.acquire(number, lambda number=number: own[number]) as lease:
            found = outputs(pool, lease, passes=passes)
        if number not in wanted:
            fresh = AdapterPool(fakes.llama().eval(), slots=1)
            wanted[number] = outputs(fresh, fresh.acquire(0, lambda number=number: own[number]))
        assert torch.allclose(found, wanted[number], atol=1e-5)


def test_an_adapter_that_is_dropped_takes_its_weights_along():
    own = adapter(fakes.llama, QV, 1)
    pool = merging_pool(fakes.llama)
    with pool.acquire(1, lambda: own) as lease:
        outputs(pool, lease, passes=6)
    assert pool.merged.bytes > 0
    pool.drop(1)
    assert pool.merged.bytes == 0
