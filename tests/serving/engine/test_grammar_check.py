"""Grammars of strangers are compiled in a process that can be killed."""

import json
import time

import pytest

from veratune.errors import UnsupportedError
from veratune.serving.engine.grammar_check import GrammarChecker

llguidance = pytest.importorskip("llguidance", reason="structured output needs llguidance")
LIMITS = {"max_grammar_size": 200_000, "verbose_errors": False}
NUMBER = {"type": "integer"}
BOMB = {"allOf": [{"anyOf": [{"type": "string", "pattern": f"a{i}.*"}, NUMBER]} for i in range(60)]}


@pytest.fixture
def checker():
    made = GrammarChecker(LIMITS, seconds=1.0)
    yield made
    made.close()


def schema(value):
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(value))


def test_one_that_never_ends_is_refused_and_the_next_one_runs(checker):
    checker.check(schema({"type": "object"}))
    start = time.monotonic()
    with pytest.raises(UnsupportedError, match="over 1 s or too much memory"):
        checker.check(schema(BOMB))
    assert time.monotonic() - start < 12
    checker.check(schema({"type": "object"}))
    with pytest.raises(UnsupportedError, match="cannot be used: Unimplemented keys"):
        checker.check(schema({"uniqueItems": True, "type": "array"}))


def test_nothing_stays_behind(checker):
    checker.check(schema({}))
    process = checker._process
    checker.close()
    assert process.poll() is not None
    checker.check(schema({}))  # it starts again
