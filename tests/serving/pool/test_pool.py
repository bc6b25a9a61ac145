"""Adapters of many tenants in one batch, loaded, pinned, evicted and updated, each as if alone."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import veratune as vt
from tests import fakes
from tests.serving.fakes import QV, adapter
from veratune.errors import (
    AdapterError,
    BaseModelError,
    ConfigError,
    PoolFullError,
    ShapeError,
    UnsupportedError,
)
from veratune.serving.pool.pool import AdapterPool

TOKENS = torch.arange(40).view(5, 8) % 30


def alone(make, adapters, tokens=TOKENS):
    """Every row's output with its adapter, one adapter in the model."""
    out = []
    for row, own in zip(tokens, adapters, strict=True):
        model = make().eval()
        if own is not None:
            from veratune.adapter import install

            install(model, own, "x")
        with torch.no_grad():
            out.append(model(row[None])[0])
    return torch.cat(out)


def mixed(pool, leases, tokens=TOKENS):
    with pool.rows(leases), torch.no_grad():
        return pool.model(tokens)[0]


@pytest.mark.parametrize("make", [fakes.bert, fakes.llama, fakes.gpt2])
def test_every_row_answers_as_if_alone(make):
    own = [adapter(make, QV, i) for i in range(3)]
    pool = AdapterPool(make().eval(), slots=4)
    leases = [pool.acquire(i, lambda i=i: own[i]) for i in range(3)]
    order = [leases[2], None, leases[0], leases[1], leases[2]]
    wanted = alone(make, [own[2], None, own[0], own[1], own[2]])
    assert torch.allclose(mixed(pool, order), wanted, atol=1e-5)
    assert not torch.allclose(wanted[0], wanted[4], atol=1e-3)
    with torch.no_grad():
        assert torch.equal(
            pool.model(TOKENS)[0], make().eval()(TOKENS)[0]
        )  # outside rows: the bare model
        assert torch.equal(mixed(pool, [None] * 5), make().eval()(TOKENS)[0])


def test_adapters_of_other_ranks_seeds_targets_and_vectors_side_by_side():
    configs = [
        QV, vt.VeraConfig(rank=3, targets=("all-linear",), seed=7), vt.VeraConfig(rank=6, targets=("query", "value"), vectors="d"),
        vt.VeraConfig(rank=4, targets=("key",), vectors="b"), vt.VeraConfig(rank=4, targets=("query",), basis="monarch"),
    ]  # fmt: skip
    own = [adapter(fakes.bert, config, i) for i, config in enumerate(configs)]
    pool = AdapterPool(fakes.bert().eval(), slots=2)
    leases = [pool.acquire(i, lambda i=i: own[i]) for i in range(5)]
    assert torch.allclose(mixed(pool, leases), alone(fakes.bert, own), atol=1e-5)
    assert torch.allclose(
        mixed(pool, [None, leases[1], None, leases[1], leases[0]]),
        alone(fakes.bert, [None, own[1], None, own[1], own[0]]),
        atol=1e-5,
    )


def test_classifiers_bring_their_own_heads():
    def make():
        return fakes.bert(labels=2)

    config = vt.VeraConfig(rank=6, targets=("query", "value"), head=("classifier",))
    own = []
    for i in range(2):
        model = vt.attach(make(), config, "x")
        fakes.scramble(model, "x", seed=i)
        with torch.no_grad():
            model.classifier.vera["x"].weight.normal_(generator=torch.Generator().manual_seed(i))
        own.append(vt.extract(model, "x"))
    pool = AdapterPool(make().eval(), slots=3)
    one, two = (pool.acquire(i, lambda i=i: own[i]) for i in range(2))
    wanted = alone(make, [own[1], None, own[0], own[1], own[0]])
    assert torch.allclose(mixed(pool, [two, None, one, two, one]), wanted, atol=1e-5)


def test_the_oldest_idle_adapter_makes_room_and_one_in_use_never_does():
    own = [adapter(fakes.bert, QV, i) for i in range(4)]
    pool = AdapterPool(fakes.bert().eval(), slots=2)
    first = pool.acquire(0, lambda: own[0])
    pool.acquire(1, lambda: own[1]).release()
    pool.acquire(2, lambda: own[2]).release()  # in place of 1
    assert (0 in pool, 1 in pool, 2 in pool) == (True, False, True)
    assert (pool.stats.hits, pool.stats.loads, pool.stats.evictions) == (0, 3, 1)
    with pool.acquire(2) as second:
        assert pool.stats.hits == 1
        with pytest.raises(PoolFullError, match="every adapter in memory is in use"):
            pool.acquire(3, lambda: own[3])
    assert torch.allclose(mixed(pool, [first] * 5), alone(fakes.bert, [own[0]] * 5), atol=1e-5)
    with (
        pytest.raises(AdapterError, match="the lease of adapter 2 was given back"),
        pool.rows([second]),
    ):
        pass
    first.release()
    first.release()
    with pytest.raises(AdapterError, match="no adapter 9 in the pool"):
        pool.acquire(9)


def test_an_update_takes_another_slot_while_the_old_version_answers():
    old, new = adapter(fakes.bert, QV, 0), adapter(fakes.bert, QV, 1)
    pool = AdapterPool(fakes.bert().eval(), slots=2)
    before = pool.acquire(("alice", 1), lambda: old)
    after = pool.acquire(("alice", 2), lambda: new)
    assert before.slot != after.slot
    rows = [before, after, before, after, before]
    assert torch.allclose(
        mixed(pool, rows), alone(fakes.bert, [old, new, old, new, old]), atol=1e-5
    )
    assert not pool.drop(("alice", 1))
    before.release()
    assert pool.drop(("alice", 1))
    assert pool.drop("nobody")
    assert len(pool) == 1


def test_a_limit_in_bytes_evicts_over_all_planes():
    small, large = (
        adapter(fakes.bert, QV, 0),
        adapter(fakes.bert, vt.VeraConfig(rank=6, targets=("all-linear",)), 1),
    )
    pool = AdapterPool(fakes.bert().eval(), slots=8)
    for name, own in (("small", small), ("large", large)):
        pool.acquire(name, lambda own=own: own).release()
    assert pool.bytes == 4 * (small.trained_values + large.trained_values)
    pool.max_bytes = pool.bytes + pool.frozen_bytes
    pool.acquire("small too", lambda: small).release()
    assert ("small" in pool, "large" in pool, "small too" in pool) == (False, True, True)
    narrow = AdapterPool(fakes.bert().eval(), slots=8, dtype=torch.bfloat16)
    narrow.acquire(0, lambda: small).release()
    narrow.max_bytes = narrow.frozen_bytes + 4 * small.trained_values
    for i in range(3):
        narrow.acquire(i, lambda: small).release()
    assert len(narrow) == 2  # half as many bytes each


def test_frozen_matrices_of_many_seeds_make_room_for_one_another():
    """Every tenant may have trained on a seed of their own: what a pool holds stays under its limit, and rows are as if alone."""
    # Seeds of this test alone: adapters of one seed share their matrices, which another test's
    # larger layers would have grown.
    own = [
        adapter(fakes.bert, vt.VeraConfig(rank=6, targets=("query", "value"), seed=100 + i), i)
        for i in range(9)
    ]
    pool = AdapterPool(fakes.bert().eval(), slots=8)
    pool.acquire(0, lambda: own[0]).release()
    one = pool.frozen_bytes
    assert one == 4 * 6 * (32 + 32)  # A (6, 32) and B (32, 6) in float32
    pool.max_bytes = 3 * (one + pool.bytes)
    for seed in range(1, 9):
        held = pool.acquire(seed, lambda seed=seed: own[seed])
        assert pool.frozen_bytes + pool.bytes <= pool.max_bytes
        assert torch.allclose(
            mixed(pool, [held] * 5), alone(fakes.bert, [own[seed]] * 5), atol=1e-5
        )
        held.release()
    assert len(pool) == 3
    assert pool.frozen_bytes == 3 * one
    again = pool.acquire(0, lambda: own[0])
    assert torch.allclose(mixed(pool, [again] * 5), alone(fakes.bert, [own[0]] * 5), atol=1e-5)
    others = [pool.acquire(seed, lambda seed=seed: own[seed]) for seed in (1, 2)]
    with pytest.raises(PoolFullError, match="every adapter in memory is in use"):
        pool.acquire(3, lambda: own[3])
    for lease in others:
        lease.release()
    pool.acquire(3, lambda: own[3])


def test_what_would_fill_the_memory_is_refused():
    large = adapter(fakes.bert, vt.VeraConfig(rank=4000, targets=("query",)), 0)
    pool = AdapterPool(fakes.bert().eval(), slots=8, max_bytes=100_000, max_rank=64)
    for call in (lambda: pool.check(large), lambda: pool.acquire(0, lambda: large)):
        with pytest.raises(UnsupportedError, match="has rank 4,000; adapters of rank 64 at most"):
            call()
    pool.max_rank = None
    for call in (lambda: pool.check(large), lambda: pool.acquire(0, lambda: large)):
        with pytest.raises(
            UnsupportedError, match="take 1,056,256 bytes; adapters have 100,000 here"
        ):
            call()
    assert pool.frozen_bytes == pool.bytes == 0


def test_values_in_bfloat16_are_those_of_the_rounded_adapter():
    own = adapter(fakes.bert, QV, 0)
    pool = AdapterPool(fakes.bert().eval(), slots=1, dtype=torch.bfloat16)
    lease = pool.acquire(0, lambda: own)
    rounded = own.to(torch.bfloat16).to(torch.float32)
    assert torch.allclose(mixed(pool, [lease] * 5), alone(fakes.bert, [rounded] * 5), atol=1e-5)


def test_close_gives_the_model_back():
    model = fakes.bert().eval()
    before = dict(model.named_modules())
    pool = AdapterPool(model, slots=1)
    pool.acquire(0, lambda: adapter(fakes.bert, QV, 0))
    assert dict(model.named_modules()).keys() != before.keys()
    pool.close()
    assert dict(model.named_modules()) == before


def test_mistakes():
    with pytest.raises(ConfigError, match="slots is 0"):
        AdapterPool(fakes.bert(), slots=0)
    with pytest.raises(AdapterError, match="has adapters already"):
        AdapterPool(vt.attach(fakes.bert(), QV), slots=1)
    pool = AdapterPool(fakes.bert().eval(), slots=1)
    with pytest.raises(BaseModelError, match="another base model"):
        pool.acquire(0, lambda: adapter(fakes.llama, QV, 0))

    def other():
        model = fakes.bert()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
        return model

    pool.acquire(1, lambda: adapter(fakes.bert, QV, 0)).release()
    with pytest.raises(BaseModelError, match="agree only to"):
        pool.acquire(2, lambda: adapter(other, QV, 0))
    with pytest.raises(OSError, match="gone"):
        pool.acquire(3, lambda: (_ for _ in ()).throw(OSError("gone")))
    assert len(pool) == 1
    with (
        pool.rows([pool.acquire(1)]),
        pytest.raises(ShapeError, match="got a batch of 5 rows; rows\\(\\) named 1"),
    ):
        pool.model(TOKENS)

    def conv():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3))

    with pytest.raises(UnsupportedError, match="is a convolution"):
        AdapterPool(conv(), slots=1).acquire(
            0, lambda: adapter(conv, vt.VeraConfig(rank=2, targets=("all-conv",)), 0)
        )


OWN = [adapter(fakes.bert, vt.VeraConfig(rank=2, targets=("query",)), i) for i in range(6)]


@given(
    st.lists(
        st.tuples(st.sampled_from(("acquire", "release", "drop")), st.integers(0, 5)), max_size=30
    )
)
def test_slots_are_never_shared_nor_lost(steps):
    pool = AdapterPool(fakes.bert().eval(), slots=3)
    held = {i: [] for i in range(6)}
    for what, i in steps:
        if what == "acquire":
            try:
                held[i].append(pool.acquire(i, lambda i=i: OWN[i]))
            except PoolFullError:
                assert sum(bool(leases) for leases in held.values()) == 3
        elif what == "release" and held[i]:
            held[i].pop().release()
        elif what == "drop":
            assert pool.drop(i) != bool(held[i])
        in_use = {i: leases[0].slot for i, leases in held.items() if leases}
        assert len(set(in_use.values())) == len(in_use)
        assert all(lease.slot == in_use[i] for i, leases in held.items() for lease in leases)
        for i, slot in in_use.items():
            group = held[i][0].group
            assert torch.equal(
                group.values[slot, :2], OWN[i].d["encoder.layer.0.attention.self.query"]
            )
        assert len(pool) <= 3


def test_threads_share_a_bank():
    own = [adapter(fakes.bert, QV, i) for i in range(12)]
    pool = AdapterPool(fakes.bert().eval(), slots=6)
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            i = int(torch.randint(12, (), generator=generator))
            try:
                with pool.acquire(i, lambda i=i: own[i]) as lease:
                    first = own[i].d["encoder.layer.0.attention.self.query"]
                    if not torch.equal(lease.group.values[lease.slot, :6], first):
                        wrong.append(i)
            except PoolFullError:
                pass

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.pinned == 0
