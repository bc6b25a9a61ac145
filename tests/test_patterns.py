"""The target language, and that a file's patterns are never evaluated."""

import contextlib
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune import patterns
from veratune.errors import ConfigError
from veratune.patterns import exact_pattern, matches


@given(st.text(min_size=1, max_size=80))
def test_any_text_is_a_pattern_or_one_clear_error(text):
    try:
        assert matches("re:" + text, "model.layers.0.q_proj") in (True, False)
    except ConfigError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("expression", ["(a+)+$", "(a|aa)+$", "(.*)*b", "a{1,100}{1,9}"])
def test_expressions_that_explode_elsewhere_are_linear_here(expression):
    with contextlib.suppress(ConfigError):  # RE2 refuses what it could not match in linear time
        assert not matches("re:" + expression, "a" * 5000 + "!")


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("a" * 257, "has 257 characters; at most 256"),
        ("(", "not a regular expression in RE2"),
        ("(?=a)a", "not a regular expression in RE2"),
    ],
)
def test_expressions_that_are_refused(expression, message):
    with pytest.raises(ConfigError, match=message):
        matches("re:" + expression, "a")


def test_an_exact_pattern_means_one_name():
    names = ["a.q", "b.a.q", "c"]
    for name in names:
        assert [other for other in names if matches(exact_pattern(name, names), other)] == [name]


@pytest.mark.parametrize("pattern", ["re:.*q_proj", "*.q_proj"])
def test_a_files_patterns_are_a_record(tmp_path, monkeypatch, pattern):
    model = vt.attach(
        fakes.llama(),
        vt.VeraConfig(rank=4, targets=[pattern, "v_proj"], rank_pattern={pattern: 6}),
        "a",
    )
    scramble(model, "a")
    vt.save(model, tmp_path / "a.safetensors")

    def forbidden(*args, **kwargs):
        raise AssertionError("a file's regular expression was evaluated")

    monkeypatch.setattr(patterns.re2, "fullmatch", forbidden)
    other = fakes.llama()
    vt.load(other, tmp_path / "a.safetensors")
    first, second = vt.extract(model), vt.extract(other)
    assert first.ranks == second.ranks
    assert vt.adapters(other)["a"].targets == (pattern, "v_proj")


def test_ranks_behind_an_expression_are_read_from_d():
    config = vt.VeraConfig(rank=4, targets=["q_proj"], rank_pattern={"re:.*0.*": 6})
    adapter = vt.extract(vt.attach(fakes.llama(), config, "a"))
    unlisted = dataclasses.replace(adapter, layer_ranks=None)
    assert unlisted.ranks == adapter.ranks
