"""What is kept of prompts, against a plain list; and conversations that go on, which say what they say without it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.serving.fakes import (
    FAMILIES,
    GREEDY,
    QV,
    adapter,
    engine,
    generate_alone,
    run_all,
    small_llama,
)
from veratune.errors import UnsupportedError
from veratune.serving.engine.prefix_cache import MIN_TOKENS, PrefixCache
from veratune.serving.engine.requests import GenerationRequest

texts = st.lists(st.integers(0, 1), min_size=1, max_size=24)
owners = st.tuples(st.sampled_from("ab"), st.sampled_from([None, ("a", "x", 1), ("a", "x", 2)]))


def made(tokens):
    """Keys and values in which every token is itself."""
    own = torch.tensor(tokens, dtype=torch.float32)[None, None, :, None]
    return [(own, -own)]


@given(st.lists(st.tuples(owners, texts, st.booleans()), max_size=30), st.integers(1, 20))
def test_what_is_found_is_the_longest_beginning_that_its_owner_has(asked, limit):
    kept, prefixes = [], PrefixCache(8 * 24 * limit)
    for owner, tokens, keep in asked:
        found = prefixes.find(owner, tokens)
        common = [next((i for i, (x, y) in enumerate(zip(t, tokens[:-1], strict=False)) if x != y), min(len(t), len(tokens) - 1))
                  for o, t in kept if o == owner]  # fmt: skip
        if found is None:
            assert limit < 20 or max(common, default=0) < MIN_TOKENS
        else:
            prefix, size = found
            assert MIN_TOKENS <= size <= min(max(common), len(tokens) - 1)
            assert prefix.layers[0][0][0, 0, :size, 0].tolist() == tokens[:size]
            assert limit < 20 or size == max(common)
        if keep:
            prefixes.add(owner, tokens, made(tokens))
            if len(tokens) >= MIN_TOKENS:
                kept.append((owner, tokens))
        assert prefixes.used_bytes <= prefixes.max_bytes
    for key in (None, ("a", "x", 1)):
        prefixes.remove_adapter(key)
        for owner, tokens in kept:
            if owner[1] == key:
                assert prefixes.find(owner, [*tokens, 0]) is None


def test_what_goes_on_takes_the_place_of_what_it_goes_on_from_and_what_was_used_longest_ago_goes_first():
    prefixes, turns = PrefixCache(8 * 60), [list(range(size)) for size in (10, 20, 30)]
    for turn in turns:
        prefixes.add(("a", None), turn, made(turn))
    assert prefixes.used_bytes == 8 * 30
    prefixes.add(("b", None), turns[1], made(turns[1]))
    assert prefixes.find(("a", None), turns[2]) is not None
    prefixes.add(("c", None), turns[1], made(turns[1]))
    assert prefixes.find(("b", None), turns[1]) is None
    assert prefixes.find(("a", None), turns[2])[1] == 29
    prefixes.add(
        ("c", None), list(range(100)), made(list(range(100)))
    )  # more than there is room for at all
    assert prefixes.used_bytes == 8 * 50
    assert np.array_equal(prefixes.find(("c", None), turns[1])[0].tokens, turns[1])


@pytest.mark.parametrize("make", [small_llama, *FAMILIES])
def test_a_conversation_that_goes_on_says_what_it_says_without(make):
    own = [None, adapter(make, QV, 0), adapter(make, QV, 1)]
    server = engine(make, rows=3, max_num_batched_tokens=16, prefix_cache_bytes=10**8)
    server.eos_token_ids = set()
    talks = [[5 + i % 2, *range(4, 20)] for i in range(3)]
    for turn in range(3):
        before = server.stats.cached_tokens
        requests = [
            GenerationRequest("t", talk, GREEDY, key=i or None, load=lambda i=i: own[i]) for i, talk in enumerate(talks)
        ]  # fmt: skip
        answers, _ = run_all(server, requests)
        for i, (talk, answer) in enumerate(zip(talks, answers, strict=True)):
            assert answer == generate_alone(make, talk, own[i], 12)[:12]
            assert requests[i].cached_tokens == (
                0 if turn == 0 else len(talk) - 3
            )  # all but the last of the answer and two new ones
            talks[i] = [*talk, *answer, 7, 9]
        assert server.stats.cached_tokens - before == sum(
            request.cached_tokens for request in requests
        )
    assert server.runner.cache.lengths == [0] * 3


def test_a_prefix_is_its_tenants_adapters_and_versions_alone():
    one, two, prompt = adapter(small_llama, QV, 0), adapter(small_llama, QV, 1), list(range(4, 24))
    server = engine(rows=2, prefix_cache_bytes=10**8)
    server.eos_token_ids = set()

    def known(tenant, key, own):
        request = GenerationRequest(tenant, prompt, GREEDY, key=key, load=lambda: own)
        (answer,), _ = run_all(server, [request])
        assert answer == generate_alone(small_llama, prompt, own, 12)
        return request.cached_tokens

    first = ("ann", "x", 1)
    assert [known("ann", first, one), known("ann", first, one)] == [0, 19]
    assert known("ann", ("ann", "x", 2), two) == 0
    assert known("ann", ("ann", "y", 1), two) == 0
    assert known("ann", None, None) == 0
    assert known("ben", None, None) == 0  # nor does the time tell what others asked the base model
    assert known("ann", None, None) == 19
    held = server.prefix_cache_bytes
    server.forget(first)
    assert 0 < server.prefix_cache_bytes < held
    assert known("ann", first, one) == 0


def test_a_row_that_failed_is_not_kept():
    huge = adapter(small_llama, QV, 1)
    for b in huge.b.values():
        b.fill_(1e38)
    server = engine(rows=2, prefix_cache_bytes=10**8)
    _, found = run_all(
        server, [GenerationRequest("t", list(range(4, 24)), GREEDY, key="huge", load=lambda: huge)]
    )
    assert [type(answers[-1]) for answers in found.values()] == [UnsupportedError]
    assert server.prefix_cache_bytes == 0


def test_a_cancelled_request_leaves_what_it_read():
    server = engine(rows=1, max_num_batched_tokens=16, prefix_cache_bytes=10**8)
    prompt = list(range(4, 44))
    request = GenerationRequest("t", prompt, GREEDY)
    request.on_output = lambda piece: None
    server.submit(request)
    server.step()
    server.cancel(request)
    server.step()
    again = GenerationRequest("t", prompt, GREEDY)
    (answer,), _ = run_all(server, [again])
    assert again.cached_tokens == 16
    assert answer == generate_alone(small_llama, prompt, None, 12)[: len(answer)]
