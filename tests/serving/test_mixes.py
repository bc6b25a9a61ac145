"""Names of mixes, and the mixes in use."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veratune.errors import ConfigError
from veratune.serving import mixes
from veratune.serving.mixes import MixIndex, MixKey, is_mix, parse_mix

NAMES = st.from_regex(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}(/[A-Za-z0-9][A-Za-z0-9._-]{0,20})?", fullmatch=True
)
WEIGHTS = st.decimals(-1000, 1000, places=3)


@given(st.lists(st.tuples(NAMES, WEIGHTS), min_size=1, max_size=8))
def test_a_name_is_read_as_it_was_written(parts):
    model = "+".join(f"{name}:{weight:f}" for name, weight in parts)
    assert is_mix(model)
    assert parse_mix(model) == [(name, float(weight)) for name, weight in parts]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("a:0.7+b", "'b' is no part of a mix"),
        ("a+b", "'a' is no part"),
        ("a:0.7+", "'' is no part"),
        ("a:", "'a:' is no part"),
        (":1", "':1' is no part"),
        ("a:nan", "no part"),
        ("a:1e9", "no part"),
        ("a:1e+9", "no part"),
        ("a:inf", "no part"),
        ("a:0x1", "no part"),
        ("a:٣", "no part"),
        ("a:" + "1" * 20, "no part"),
        ("+".join(["a:1"] * 9), "a mix of 9 adapters; 8 are taken"),
        ("a:" + "9" * 3000, "3,002 characters"),
    ],
)
def test_other_names_are_refused(model, why):
    with pytest.raises(ConfigError, match=why):
        parse_mix(model)


def test_names_of_adapters_are_no_mixes():
    assert not is_mix("ann/house-2.1_x")


def key(*parts):
    return MixKey(tuple((("ann", name, number), weight) for name, number, weight in parts))


def test_a_mix_of_older_versions_is_forgotten():
    forgotten = []
    index = MixIndex(forgotten.append)
    old, other, new = key(("a", 1, 0.5)), key(("a", 1, 0.6)), key(("a", 2, 0.5))
    for used in (old, other, old, new, new):
        index.use(used)
    assert forgotten == [old]
    index.forget_part("ann", "b")
    index.forget_part("ben", "a")
    assert forgotten == [old]
    index.forget_part("ann", "a")
    assert forgotten[1:] == [other, new]


def test_the_mixes_used_last_are_kept(monkeypatch):
    monkeypatch.setattr(mixes, "_MAX_MIXES", 2)
    forgotten = []
    index = MixIndex(forgotten.append)
    first, second, third = (key(("a", 1, weight)) for weight in (1.0, 2.0, 3.0))
    for used in (first, second, first, third):
        index.use(used)
    assert forgotten == [second]
