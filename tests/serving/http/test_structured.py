"""Structured output over HTTP: a random model's completions match their schemas."""

import json
import re
import threading
import time

import jsonschema
import openai
import pytest

from tests.serving.http.fakes import FILES, RunningServer
from veratune.serving.engine.grammar import MAX_GRAMMAR_BYTES

pytest.importorskip("llguidance", reason="structured output needs llguidance")
TALK = [{"role": "user", "content": "hi"}]
WORD = {"type": "string", "maxLength": 5}


def thing(**properties):
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS = [
    thing(on={"type": "boolean"}, level={"enum": [1, 2, 3]}),
    thing(name=WORD, age={"type": "integer", "minimum": 0, "maximum": 120}),
    thing(color={"const": "red"}),
    thing(size={"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
    thing(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    thing(when={"type": "string", "format": "date"}),
    thing(id={"type": "string", "format": "uuid"}),
    thing(tags={"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3}),
    thing(pair={"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "minItems": 2}),
    thing(choice={"anyOf": [{"type": "null"}, thing(x={"type": "boolean"})]}),
    thing(one={"oneOf": [{"const": "a"}, {"const": "b"}]}),
    thing(both={"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 5}]}),
    thing(deep=thing(deeper=thing(deepest={"enum": ["end"]}))),
    thing(nothing={"type": "null"}),
    thing(even={"type": "integer", "multipleOf": 2, "minimum": 0, "maximum": 20}),
    {"$ref": "#/$defs/Node", "$defs": {"Node": thing(v={"type": "boolean"}, next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/Node"}]})}},
    {"type": "array", "items": thing(ok={"type": "boolean"}), "maxItems": 3},
    {"enum": ["x", 3, None, {"a": [1]}]},
    {"type": ["boolean", "null"]},
    {"type": "object", "properties": {"a": {"type": "boolean"}, "b": WORD}, "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    {"type": "string"},
    {"type": "object"},
    {},
]  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    server = RunningServer(tmp_path_factory.mktemp("structured"), max_model_len=1024)
    server.engine.eos_token_ids = {1}
    with server.http() as http:
        assert http.put("/v1/adapters/alice", content=FILES["alice"]).status_code == 201
    yield server
    server.stop()


def named(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_every_whole_completion_matches_its_schema(served, schema):
    """Beside free completions of other tenants in the same batch; a cut one says so."""
    with served.openai() as client, served.openai("ben") as other:
        free = threading.Thread(
            target=other.completions.create,
            kwargs={"model": "base", "prompt": [4, 5], "max_tokens": 60},
        )
        free.start()
        found = client.chat.completions.create(
            model="alice", messages=TALK, n=3, seed=1, max_tokens=200, response_format=named(schema)
        )
        text = client.completions.create(
            model="base", prompt=[5], seed=2, max_tokens=200, extra_body={"guided_json": schema}
        )
        free.join()
    texts = [(c.finish_reason, c.message.content) for c in found.choices]
    texts += [(c.finish_reason, c.text) for c in text.choices]
    for reason, content in texts:
        if reason == "stop":
            checker = jsonschema.Draft202012Validator
            checker(schema, format_checker=checker.FORMAT_CHECKER).validate(json.loads(content))
        else:
            assert reason == "length"
    unbounded = schema in SCHEMAS[-4:] or "$ref" in schema
    assert unbounded or all(reason == "stop" for reason, _ in texts)


def test_a_stream_is_the_whole_completion_and_a_cut_one_says_so(served):
    options = {"model": "base", "messages": TALK, "seed": 3, "response_format": named(SCHEMAS[1])}
    with served.openai() as client:
        whole = client.chat.completions.create(**options, max_tokens=300).choices[0]
        chunks = list(client.chat.completions.create(**options, max_tokens=300, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole.message.content
        cut = client.chat.completions.create(**options, max_tokens=4).choices[0]
        assert (cut.finish_reason, whole.message.content.startswith(cut.message.content)) == (
            "length",
            True,
        )


def test_every_way_to_ask(served):
    with served.openai() as client:

        def text(**extra):
            return (
                client.chat.completions.create(
                    model="base", messages=TALK, max_tokens=300, seed=4, extra_body=extra
                )
                .choices[0]
                .message.content
            )

        level = thing(level={"enum": [1, 2]})
        for given in (
            {"guided_json": level},
            {"guided_json": json.dumps(level)},
            {"structured_outputs": {"json": level}},
        ):
            assert json.loads(text(**given))["level"] in (1, 2)
        for given in ({"guided_regex": "[ab]{3}"}, {"structured_outputs": {"regex": "[ab]{3}"}}):
            assert re.fullmatch("[ab]{3}", text(**given))
        for given in (
            {"guided_choice": ["yes", "no"]},
            {"structured_outputs": {"choice": ["yes", "no"]}},
        ):
            assert text(**given) in ("yes", "no")
        assert text(guided_grammar='start: "a" | "b"') in ("a", "b")


@pytest.mark.parametrize(
    ("param", "why", "body"),
    [
        ("response_format", "Unimplemented keys", named({"type": "array", "uniqueItems": True})),
        ("response_format", "NoExtensionBias", named({"$ref": "#"})),
        ("response_format", "retrieving it failed", named({"$ref": "http://127.0.0.1/x"})),
        ("response_format", "no schema", {"type": "json_schema", "json_schema": {"name": "x"}}),
        ("response_format", "at most 65,536", named({"const": "a" * MAX_GRAMMAR_BYTES})),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(served, param, why, body):
    with served.openai() as client, pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="base", messages=TALK, response_format=body)
    assert (caught.value.param, why in str(caught.value)) == (param, True)


def test_two_constraints_are_refused(served):
    with served.http() as http:
        for param, extra in (
            ("guided_regex", {"guided_json": {}, "guided_regex": "a"}),
            ("structured_outputs", {"structured_outputs": {"json": {}, "regex": "a"}}),
            ("structured_outputs", {"structured_outputs": {}}),
            ("guided_regex", {"guided_regex": "(("}),
            ("guided_choice", {"guided_choice": []}),
        ):
            reply = http.post(
                "/v1/completions", json={"model": "base", "prompt": "hi", "max_tokens": 4, **extra}
            )
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


BOMBS = {
    "schema": named({"allOf": [{"anyOf": [{"type": "string", "pattern": f"a{i}.*"}, {"type": "integer"}]} for i in range(60)]}),
    "nested": named({"type": "array", "items": {"type": "array", "minItems": 10**6}, "minItems": 10**6}),
    "enum": named({"enum": [f"{i:06}" for i in range(6000)]}),
    "patterns": named(thing(**{f"k{i}": {"type": "string", "pattern": "^(a|aa)*b{0,900}$"} for i in range(500)})),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_hostile_grammar_holds_up_nobody(served, bomb):
    """It is refused, or it runs; the health check and other tenants go on meanwhile."""
    body = {"model": "base", "messages": TALK, "max_tokens": 8, "response_format": BOMBS[bomb]}
    with served.http() as http, served.http("ben") as other:
        replies = []
        threads = [
            threading.Thread(
                target=lambda: replies.append(http.post("/v1/chat/completions", json=body))
            )
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        slowest = 0.0
        while any(thread.is_alive() for thread in threads):
            start = time.monotonic()
            assert other.get("/health").status_code == 200
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(0.02)
        free = other.post("/v1/completions", json={"model": "base", "prompt": [4], "max_tokens": 2})
    assert free.status_code == 200
    assert all(reply.status_code in (200, 400) for reply in replies)
    assert slowest < 5
