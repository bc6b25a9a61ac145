import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veratune.config import VeraConfig
from veratune.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be an integer of at least 1"),
        ({"rank": -4}, "rank is -4; it must be an integer of at least 1"),
        ({"rank": 2.5}, "rank is 2.5; it must be an integer of at least 1"),
        ({"rank": True}, "rank is True; it must be an integer of at least 1"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern['q'] is 0; it must be an integer of at least 1"),
        (
            {"targets": []},
            "targets is empty; name at least one layer, or leave it out for query and value",
        ),
        ({"targets": [1]}, "targets is [1]; it must be a list of layer names"),
        ({"layers": [-1]}, "layers is [-1]; it must be a list of block indices from 0 up"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be a probability in [0, 1)"),
        ({"seed": -1}, "seed is -1; it must be an integer from 0 to 2**64 - 1"),
        ({"d_init": float("nan")}, "d_init is nan; it must be a finite number"),
        (
            {"d_init": 0},
            "d_init is 0, and b starts at 0 too: neither would get a gradient; "
            "use another d_init, or vectors='d'",
        ),
        (
            {"vectors": "b", "d_init": 0.1},
            "d_init is set, but vectors='b' has no d (it stays 1); leave d_init out",
        ),
        (
            {"init": "kaiming"},
            "init is 'kaiming'; it must be one of kaiming_uniform, kaiming_normal, uniform; did you mean "
            "'kaiming_normal' or 'kaiming_uniform'?",
        ),
        (
            {"basis": "peft", "sharing": "unique"},
            "basis='peft' draws one kaiming_uniform pair for one rank, but sharing is 'unique'; leave sharing at its "
            "default or use basis='random'",
        ),
    ],
)
def test_bad_settings_say_what_is_wanted(settings, message):
    with pytest.raises(ConfigError) as caught:
        VeraConfig(**settings)
    assert str(caught.value) == message


def test_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown setting 'rnak' .*; did you mean 'rank'"):
        VeraConfig.from_dict({"rnak": 3})


def test_a_config_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        VeraConfig().rank = 3


@given(
    st.builds(
        VeraConfig,
        rank=st.integers(1, 4096),
        targets=st.none()
        | st.lists(st.sampled_from(["q", "re:.*v", "*.k"]), min_size=1).map(tuple),
        layers=st.none() | st.lists(st.integers(0, 40)).map(tuple),
        rank_pattern=st.dictionaries(st.sampled_from(["q", "v"]), st.integers(1, 64)),
        dropout=st.floats(0, 0.99),
        seed=st.integers(0, 2**64 - 1),
        sharing=st.sampled_from(["shared", "per_shape", "unique"]),
    )
)
def test_json_round_trip(config):
    assert VeraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_d_starts_where_the_identity_is():
    assert VeraConfig().start_d == 0.1
    assert VeraConfig(vectors="d").start_d == 0.0
    assert VeraConfig(vectors="d", d_init=0.2).start_d == 0.2
