"""Tokens are sampled as the formulas of SamplingParams say, each row as if alone."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veratune.errors import ConfigError
from veratune.serving.engine.sampler import SamplingState, sample, token_logprobs
from veratune.serving.engine.sampling import SamplingParams

CPU = torch.device("cpu")


def state(vocab, params, outputs=(), prompt=(), **options):
    made = SamplingState(params, prompt, vocab, CPU, **options)
    for token in outputs:
        made.add(token)
    return made


def sample_one(logits, params, outputs=(), prompt=(), **options):
    """The sampled token of one row of logits."""
    logits = torch.as_tensor(logits).float()
    (token,) = sample(logits[None], [state(len(logits), params, outputs, prompt, **options)])
    return token


@given(
    st.floats(0, 2, allow_subnormal=True),
    st.floats(0, 1, exclude_min=True, allow_subnormal=True),
    st.integers(0, 9),
    st.floats(0, 1),
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=6),
)
def test_any_settings_draw_a_token(temperature, top_p, top_k, min_p, logits):
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    assert 0 <= sample_one(logits, params).token_id < len(logits)


@given(
    st.lists(st.integers(-9, 9), min_size=4, max_size=4),
    st.lists(st.integers(0, 3), max_size=6),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(-2, 2),
    st.integers(-2, 2),
    st.sampled_from((0.5, 1.0, 2.0)),
    st.dictionaries(st.integers(0, 3), st.integers(-100, 100)),
)
def test_penalties_and_bias_change_the_logits(
    logits, outputs, prompt, frequency, presence, repetition, bias
):
    def changed(token, value):
        if token in outputs or token in prompt:
            value = value / repetition if value > 0 else value * repetition
        value -= frequency * outputs.count(token) + presence * (token in outputs)
        return value + bias.get(token, 0)

    wanted = [changed(token, value) for token, value in enumerate(logits)]
    params = SamplingParams(
        temperature=0,
        frequency_penalty=frequency,
        presence_penalty=presence,
        repetition_penalty=repetition,
        logit_bias=tuple(bias.items()),
        logprobs=0,
    )
    found = sample_one(logits, params, outputs, prompt)
    assert wanted[found.token_id] == max(wanted)
    plain = torch.tensor(logits).float().log_softmax(-1)
    assert found.logprob == pytest.approx(plain[found.token_id].item())


def test_rows_of_different_settings_are_sampled_as_if_alone():
    rng, vocab = random.Random(0), 40
    logits = torch.randn(12, vocab, generator=torch.Generator().manual_seed(0)) * 3
    rows = []
    for i in range(12):
        params = SamplingParams(
            temperature=rng.choice((0, 0.7, 1.3)),
            top_p=rng.choice((1.0, 0.8)),
            top_k=rng.choice((0, 5)),
            min_p=rng.choice((0.0, 0.1)),
            frequency_penalty=rng.choice((0, 1.5)),
            repetition_penalty=rng.choice((1.0, 1.3)),
            logit_bias=rng.choice(((), ((3, 5.0), (9, -100.0)))),
            min_tokens=rng.choice((0, 9)),
            logprobs=rng.choice((None, 0, 3)),
        )
        rows.append((params, [i, i, 7], [1, 2]))

    def made(row, seed):
        return state(vocab, *row, end_token_ids=(0,), seed=seed)

    together = sample(logits, [made(row, i) for i, row in enumerate(rows)])
    for i, row in enumerate(rows):
        (alone,) = sample(logits[i : i + 1], [made(row, i)])
        assert together[i].token_id == alone.token_id
        assert together[i].logprob == pytest.approx(alone.logprob)
        assert [t for t, _ in together[i].top_logprobs] == [t for t, _ in alone.top_logprobs]


def test_cuts_drop_the_tail():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    shares = logits.softmax(-1)

    def drawn(**options):
        one = state(4, SamplingParams(**options), seed=0)
        return [sample(logits[None], [one])[0].token_id for _ in range(2000)]

    assert set(drawn(top_k=2)) == {0, 1}
    assert set(drawn(top_p=0.64)) == {0}  # the first alone has 0.644
    assert set(drawn(top_p=0.65)) == {0, 1}
    assert set(drawn(min_p=0.3)) == {0, 1}  # the second has 0.368 of the first
    assert set(drawn(temperature=0)) == {0}
    tokens = drawn()
    assert tokens.count(0) / 2000 == pytest.approx(shares[0].item(), abs=0.04)
    cold = drawn(temperature=0.5)
    assert cold.count(0) / 2000 == pytest.approx((2 * logits).softmax(-1)[0].item(), abs=0.04)


def test_nothing_ends_a_completion_before_min_tokens():
    params = SamplingParams(temperature=0, min_tokens=2, max_tokens=4)
    assert sample_one([1.0, 9.0, 8.0], params, end_token_ids=(1,)).token_id == 2
    assert sample_one([1.0, 9.0, 8.0], params, outputs=[2, 2], end_token_ids=(1,)).token_id == 1


def test_many_biases_are_one_operation():
    """300 biases of each of 8 rows change the scores in one call, whatever their number."""
    vocab = 1000
    calls = []
    logits = torch.zeros(8, vocab)
    bias = tuple((token, float(token % 7)) for token in range(300))
    params = SamplingParams(temperature=0, logit_bias=(*bias, (500, 50.0)))
    states = [state(vocab, params) for _ in range(8)]
    real = torch.Tensor.index_put_
    try:
        torch.Tensor.index_put_ = lambda self, *a, **k: calls.append(1) or real(self, *a, **k)
        tokens = sample(logits, states)
    finally:
        torch.Tensor.index_put_ = real
    assert [token.token_id for token in tokens] == [500] * 8
    assert len(calls) == 1


def test_logprobs_of_given_tokens():
    logits = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    one, two = token_logprobs(logits, [0, 0], [2, 0])
    assert one.logprob == pytest.approx(-math.log(1 + math.e))
    assert [token for token, _ in one.top_logprobs] == [1, 0]
    assert two.top_logprobs == ()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens is 9; at most max_tokens, 3"),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21"),
        ({"stop_token_ids": tuple(range(65))}, "stop_token_ids has 65"),
        ({"logit_bias": ((1, 101.0),)}, "logit_bias has a value outside"),
    ],
)
def test_settings_out_of_range_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        SamplingParams(**options)
