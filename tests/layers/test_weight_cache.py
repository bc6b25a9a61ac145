import copy
import gc

import pytest
import torch

import veratune as vt
from tests import fakes
from veratune.errors import ConfigError
from veratune.layers import weight_cache
from veratune.layers.weight_cache import WEIGHTS, WeightCache
from veratune.model_state import vectors_of

TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A cache of the test's own."""
    made = WeightCache(2**30)
    for module in ("weight_cache", "weight_layer"):
        monkeypatch.setattr(f"veratune.layers.{module}.WEIGHTS", made)
    return made


def model_with(*names, **settings):
    model = fakes.llama()
    for i, name in enumerate(names):
        fakes.scramble(
            vt.attach(model, vt.VeraConfig(rank=8, seed=i, **settings), name), name, seed=i
        )
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def by_plan(model, name):
    """The logits without a cache."""
    vt.use(model, name)
    model.train()
    try:
        return logits(model)
    finally:
        model.eval()


def test_answers_are_those_of_the_plans_and_sums_are_kept(fresh):
    model = model_with("a", "b")
    for name in ("a", "b", "a"):
        wanted = by_plan(model, name)
        torch.testing.assert_close(logits(model), wanted)
        held = fresh.bytes
        assert held > 0
        assert torch.equal(logits(model), logits(model))
        assert fresh.bytes == held
    weights = list(fresh.entries().values())
    logits(model)
    assert all(a is b for a, b in zip(weights, list(fresh.entries().values()), strict=True))


@pytest.mark.parametrize("write", [
    lambda v: v.d.data.mul_(3), lambda v: v.b.mul_(3), lambda v: setattr(v.b, "data", v.b.data * 3),
    lambda v: torch._foreach_mul_([v.d], 3.0), lambda v: v.load_state_dict({k: 3 * t for k, t in v.state_dict().items()}),
])  # fmt: skip
def test_an_update_of_any_kind_is_seen(write):
    model = model_with("a")
    before = logits(model)
    with torch.no_grad():
        for vectors in vectors_of(model, "a"):
            write(vectors)
    after = logits(model)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, by_plan(model, "a"))


def test_a_change_of_the_base_is_seen():
    model = model_with("a")
    logits(model)
    state = {k: v * 1.5 for k, v in model.state_dict().items() if "q_proj" in k and "vera" not in k}
    model.load_state_dict(state, strict=False)
    torch.testing.assert_close(logits(model), by_plan(model, "a"))
    merged = logits(model)
    vt.merge(model)
    torch.testing.assert_close(logits(model), merged)
    vt.unmerge(model)
    torch.testing.assert_close(logits(model), merged)


def test_the_limit_holds_and_an_adapter_does_not_displace_itself(fresh):
    model = model_with("a", "b")
    vt.use(model, "b")
    logits(model)
    whole = fresh.bytes
    fresh.resize(int(whole * 0.6))
    assert 0 < fresh.bytes <= whole * 0.6
    wanted = by_plan(model, "b")
    for _ in range(3):
        torch.testing.assert_close(logits(model), wanted)
        entries = list(fresh.entries())
        assert fresh.bytes <= whole * 0.6
    torch.testing.assert_close(logits(model), wanted)
    assert list(fresh.entries()) == entries
    vt.use(model, "a")
    logits(model)
    assert {adapter for _, adapter in fresh.entries()} == {"a"}
    assert fresh.bytes <= whole * 0.6


def test_nothing_is_kept_in_training_for_mixed_rows_under_a_plan_or_in_few_bits(fresh):
    model = model_with("a")
    by_plan(model, "a")
    model(TOKENS)  # gradients are wanted
    with vt.rows(model, ["a", None]):
        logits(model)
    logits(model_with("a", plan="factored"))
    logits(model_with("a").bfloat16())
    assert fresh.bytes == 0
    logits(model)
    assert fresh.bytes > 0
    model.train()
    assert fresh.bytes == 0


def test_it_goes_with_its_model_and_copies_have_their_own(fresh):
    model = model_with("a")
    logits(model)
    held = fresh.bytes
    twin = copy.deepcopy(model)
    assert fresh.bytes == held
    fakes.scramble(twin, "a", seed=9)
    assert not torch.allclose(logits(twin), logits(model))
    assert fresh.bytes == 2 * held
    del twin, model
    gc.collect()
    assert fresh.bytes == 0


def test_attention_blocks_are_kept_too(fresh):
    model = fakes.encoder()
    fakes.scramble(vt.attach(model, vt.VeraConfig(rank=4, targets=["q", "v"]), "a"), "a")
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        first = model.eval()(x)
        assert fresh.bytes > 0
        assert torch.equal(model(x), first)
        torch.testing.assert_close(model.train()(x), first)


def test_the_limit_is_a_number_of_bytes(monkeypatch):
    vt.cache_weights(0)
    assert weight_cache.WEIGHTS.limit == 0
    with pytest.raises(ConfigError, match="limit is -1; it must be a number of bytes, 0 or more"):
        vt.cache_weights(-1)
    assert isinstance(WEIGHTS, WeightCache)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.add_(0.5),
        lambda w: w.data[3].mul_(2),
        lambda w: w.data[:, 5].zero_(),
        lambda w: w.data.copy_(w.data.flip(0)),
    ],
)
def test_a_write_to_the_base_that_torch_does_not_count_is_seen(write):
    model = model_with("a")
    before = logits(model)
    write(model.model.layers[0].self_attn.q_proj.base.weight)
    after = logits(model)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, by_plan(model, "a"))


def test_weights_cached_in_inference_mode_give_gradients_of_the_input(fresh):
    model = model_with("a").requires_grad_(False)
    with torch.inference_mode():
        model(TOKENS)
    assert fresh.bytes > 0
    x = model.get_input_embeddings()(TOKENS).requires_grad_()
    model(inputs_embeds=x).logits.sum().backward()
    assert x.grad is not None
