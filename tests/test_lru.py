from hypothesis import given
from hypothesis import strategies as st

from veratune.lru import ByteLRU

keys = st.integers(0, 5)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), keys, st.integers(0, 12)),
        st.tuples(st.just("get"), keys, st.just(0)),
        st.tuples(st.just("pop"), keys, st.just(0)),
        st.tuples(st.just("resize"), st.integers(0, 12), st.just(0)),
    ),
    max_size=40,
)


@given(steps)
def test_it_equals_a_list_in_order_of_use(steps):
    evicted: list[int] = []
    cache: ByteLRU[int, int] = ByteLRU(10, on_evict=lambda key, value: evicted.append(key))
    model: list[tuple[int, int]] = []  # (key, size), the least recently used first
    bound = 10
    for step, key, size in steps:
        if step == "put":
            model = [entry for entry in model if entry[0] != key]
            assert cache.put(key, key * 100, size) == (size <= bound)
            if size <= bound:
                while sum(s for _, s in model) + size > bound:
                    model.pop(0)
                model.append((key, size))
        elif step == "get":
            held = [entry for entry in model if entry[0] == key]
            assert cache.get(key) == (key * 100 if held else None)
            model = [entry for entry in model if entry[0] != key] + held
        elif step == "pop":
            assert cache.pop(key) == (key * 100 if key in [k for k, _ in model] else None)
            model = [entry for entry in model if entry[0] != key]
        else:
            bound = key
            cache.resize(bound)
            while sum(s for _, s in model) > bound:
                model.pop(0)
        assert list(cache) == [k for k, _ in model]
        assert cache.used_bytes == sum(s for _, s in model) <= max(bound, 0)
        assert len(cache) == len(model)
        assert all(k in cache for k, _ in model)
    gone = len(evicted)
    cache.clear()
    assert len(evicted) == gone + len(model)
    assert cache.used_bytes == 0


def test_entries_that_may_not_leave_stay():
    cache: ByteLRU[str, int] = ByteLRU(10)
    cache.put("pinned", 1, 4)
    cache.put("free", 2, 4)
    assert not cache.put("large", 3, 8, evictable=lambda key, value: key != "pinned")
    assert list(cache) == ["pinned", "free"]
    assert cache.put("fits", 3, 6, evictable=lambda key, value: value != 1)
    assert list(cache) == ["pinned", "fits"]
    assert cache.peek("pinned") == 1
    assert list(cache) == ["pinned", "fits"]
