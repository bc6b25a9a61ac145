"""The memory of keys and values against lists of tokens: whatever comes, goes and changes places, a row sees its own tokens in their order."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veratune.errors import UnsupportedError
from veratune.serving.engine.kv_cache import KVCache

ROWS, LENGTH = 5, 40
CPU = torch.device("cpu")
moves = st.one_of(
    st.tuples(
        st.just("pass"),
        st.integers(0, ROWS - 1),
        st.lists(st.integers(0, 6), min_size=1, max_size=ROWS),
    ),
    st.tuples(st.just("swap"), st.integers(0, ROWS - 1), st.integers(0, ROWS - 1)),
    st.tuples(st.just("free"), st.integers(0, ROWS - 1), st.none()),
    st.tuples(st.just("again"), st.integers(0, ROWS - 1), st.integers(0, ROWS - 1)),
)


@given(st.lists(moves, max_size=25))
def test_every_row_sees_its_own_tokens_and_nothing_else(done):
    cache, lists, count = KVCache(ROWS, LENGTH), [[] for _ in range(ROWS)], 0
    for what, one, other in done:
        if what == "swap":
            cache.swap(one, other)
            lists[one], lists[other] = lists[other], lists[one]
        elif what == "free":
            cache.free(one)
            lists[one] = []
        elif what == "again":  # half of a row, kept and put into another
            kept, own = cache.save(other), lists[other][: len(lists[other]) // 2]
            cache.free(one)
            lists[one] = own
            cache.restore(one, kept, len(own))
        else:
            new = [min(n, LENGTH - len(lists[one + i])) for i, n in enumerate(other[: ROWS - one])]
            if max(new) == 0:
                continue
            window = cache.open(one, new, CPU)
            given = torch.full(
                (len(new), max(new)), math.nan
            )  # what is not a token may be anything
            for i, n in enumerate(new):
                own = [float(count + k) for k in range(n)]
                count += n
                lists[one + i] += own
                if n:
                    given[i, -n:] = torch.tensor(own)
            keys, values = (
                made[:, 0, :, 0]
                for made in cache.update(given[:, None, :, None], -given[:, None, :, None], 0)
            )
            assert (
                keys.shape
                == (len(new), window.longest)
                == (len(new), max(map(len, lists[one : one + len(new)])))
            )
            seen = cache.mask(torch.float32)[:, 0] == 0
            for i, n in enumerate(new):
                own = lists[one + i]
                assert keys[i, : len(own)].tolist() == own
                assert values[i, : len(own)].tolist() == [-token for token in own]
                for k in range(n):  # the k-th of the new tokens sees all before it and itself
                    at = len(own) - n + k
                    assert cache.positions[i, max(new) - n + k] == at
                    assert seen[i, max(new) - n + k].tolist() == [
                        place <= at for place in range(window.longest)
                    ]
            cache.close()
        assert cache.lengths == [len(own) for own in lists]
    for held in (*cache._keys, *cache._values):  # nothing is left of rows that are gone
        for row, own in zip(held[:, 0, :, 0], lists, strict=False):
            assert row[len(own) :].eq(0).all()


def test_with_a_sliding_window_the_last_tokens_are_seen():
    cache = KVCache(2, 16)
    cache.open(0, [5, 3], CPU)
    seen = cache.mask(torch.float32, window_size=2)[:, 0] == 0
    assert seen[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    assert seen[1, 2:].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0]]
    assert seen.any(-1).all()  # or a softmax over nothing would be NaN


def test_a_cache_is_used_inside_of_a_pass_alone():
    with pytest.raises(UnsupportedError, match="outside of a pass"):
        KVCache(2, 16).mask(torch.float32)
