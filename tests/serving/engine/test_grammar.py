"""Completions that follow a grammar, beside free ones in the same batch."""

import json
import re

import pytest

from tests import fakes
from tests.serving.fakes import QV, adapter, engine, generate_alone, run_all, small_llama
from veratune.errors import ConfigError, UnsupportedError
from veratune.serving.engine.grammar import MAX_GRAMMAR_BYTES, GrammarCompiler
from veratune.serving.engine.requests import GenerationRequest
from veratune.serving.engine.sampling import SamplingParams

pytest.importorskip("llguidance", reason="structured output needs llguidance")
GREEDY = SamplingParams(temperature=0, max_tokens=40)
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"on": {"type": "boolean"}, "level": {"enum": [1, 2, 3]}},
        "required": ["on", "level"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(fakes.tokenizer(), 300, {1})


def text_of(outputs, request):
    return "".join(delta.text for delta in outputs[id(request)])


def test_constrained_and_free_sequences_share_a_batch(compiler):
    own = adapter(small_llama, QV, 0)
    sampled = SamplingParams(temperature=1.0, seed=3, max_tokens=40)
    schema = compiler.compile("json_schema", SCHEMA)
    requests = [
        GenerationRequest("a", [4, 5], sampled, schema),
        GenerationRequest("b", [4, 5], GREEDY),
        GenerationRequest("a", [4, 6], sampled, schema, key="own", load=lambda: own),
        GenerationRequest("c", [7], sampled, compiler.compile("regex", r"[a-c]{3}\d")),
        GenerationRequest("c", [7], sampled, compiler.compile("choice", ["please", "turn off"])),
    ]
    server = engine()
    server.eos_token_ids = {1}
    tokens, outputs = run_all(server, requests)
    for i in (0, 2):
        value = json.loads(text_of(outputs, requests[i]))
        assert isinstance(value["on"], bool)
        assert value["level"] in (1, 2, 3)
        assert outputs[id(requests[i])][-1].finish_reason == "stop"
    wanted = generate_alone(small_llama, [4, 5], None, 40)
    assert tokens[1] == wanted[: len(tokens[1])]
    assert re.fullmatch(r"[a-c]{3}\d", text_of(outputs, requests[3]))
    assert text_of(outputs, requests[4]) in ("please", "turn off")


def test_a_bad_grammar_fails_its_own_request(compiler):
    bad = GenerationRequest("a", [4], GREEDY, compiler.compile("regex", "(("))
    fine = GenerationRequest("a", [4, 5], SamplingParams(temperature=0, max_tokens=3))
    tokens, outputs = run_all(engine(), [bad, fine])
    assert isinstance(outputs[id(bad)][-1], UnsupportedError)
    assert "the grammar cannot be used" in str(outputs[id(bad)][-1])
    assert tokens[1] == generate_alone(small_llama, [4, 5], None, 3)[: len(tokens[1])]


def test_grammars_are_bounded(compiler):
    with pytest.raises(ConfigError, match="at most 65,536 are accepted"):
        compiler.compile("regex", "a" * (MAX_GRAMMAR_BYTES + 1))
    with pytest.raises(ConfigError, match="the JSON schema cannot be read"):
        compiler.compile("json_schema", "{")
    with pytest.raises(ConfigError, match="choice wants a list"):
        compiler.compile("choice", [])
    with pytest.raises(ConfigError, match="is one text"):
        compiler.compile("regex", ["a"])
    lexemes = " & ".join(f"/(.*{letter}.{{{400 + i}}})/" for i, letter in enumerate("abc"))
    huge = compiler.compile("lark", f"start: A\nA: {lexemes}")
    with pytest.raises(UnsupportedError, match="fuel exhausted"):
        huge.matcher()
