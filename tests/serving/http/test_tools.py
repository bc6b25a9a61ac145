"""Tool calls of three families: any split of a stream gives the same calls, and required calls
match their schemas.
"""

import json

import hypothesis
import jsonschema
import pytest
from hypothesis import strategies

from tests.fakes import CHAT
from tests.serving.http.fakes import RunningServer
from veratune.serving.engine.requests import OutputDelta
from veratune.serving.http.prompts import PromptEncoder
from veratune.serving.http.schemas.chat import Message, Tool
from veratune.serving.http.tools import family_of, make_parser

CALL = '{"name": "light", "arguments": {"on": true}}'
TEXTS = {
    "hermes": {
        f"<tool_call>\n{CALL}\n</tool_call>": ("", 1),
        f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>": ("", 2),
        f"On it. <tool_call>{CALL}</tool_call>": ("On it. ", 1),
        f"<tool_call>{CALL}": ("", 1),
        "a < b <tool": ("a < b <tool", 0),
        "<tool_call>no</tool_call>": ("<tool_call>no</tool_call>", 0),
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>': (
            '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
            0,
        ),
    },
    "mistral": {
        f"[TOOL_CALLS][{CALL}, {CALL}]": ("", 2),
        f" [{CALL}]": ("", 1),
        "[1, 2]": ("[1, 2]", 0),
        "Hello": ("Hello", 0),
    },
    "llama3_json": {
        '{"name": "light", "parameters": {"on": true}}': ("", 1),
        f"<|python_tag|>{CALL}; {CALL}": ("", 2),
        '{"name": "light", "parameters": ': ('{"name": "light", "parameters": ', 0),
        "Hello {": ("Hello {", 0),
    },
}
CASES = [
    (family, text, *wanted) for family, texts in TEXTS.items() for text, wanted in texts.items()
]


def parse(family, pieces):
    parser = make_parser(family, ["light"])
    outputs = [*map(parser.feed, pieces), parser.finish()]
    calls = [call for output in outputs for call in output.calls]
    return "".join(output.content for output in outputs), calls


@pytest.mark.parametrize(("family", "text", "content", "count"), CASES)
def test_a_whole_text(family, text, content, count):
    found, calls = parse(family, [text])
    assert (found, len(calls)) == (content, count)
    assert all((call.name, json.loads(call.arguments)) == ("light", {"on": True}) for call in calls)
    assert len({call.id for call in calls}) == count


@hypothesis.given(strategies.sampled_from(CASES), strategies.data())
def test_any_split_gives_the_same(case, data):
    family, text, content, count = case
    cuts = sorted(data.draw(strategies.lists(strategies.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found, calls = parse(family, pieces)
    assert (found, len(calls)) == (content, count)


@hypothesis.given(strategies.sampled_from(list(TEXTS)), strategies.text(max_size=50))
def test_no_text_is_lost(family, text):
    """Text without a call of an offered tool comes back as it is."""
    content, calls = parse(family, list(text))
    assert calls == []
    assert content == text


def test_families_are_told_by_their_templates():
    assert family_of("{% if tools %}<tool_call>{% endif %}") == "hermes"
    assert family_of("{% if tools %}[TOOL_CALLS]{% endif %}") == "mistral"
    assert family_of('{% if tools %}<|python_tag|>{"name"}{% endif %}') == "llama3_json"
    assert family_of("{{ messages }}") is None
    assert family_of(None) is None


TEMPLATE = (
    "{% for t in tools or [] %}<tools>{{ t.function.name }}</tools>{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments.on }}</tool_call>"
    "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "light", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    server = RunningServer(tmp_path_factory.mktemp("tools"), max_model_len=1024)
    server.prompts, plain = [], server.engine.submit

    def submit(request):
        """Complete with a fixed text."""
        server.prompts.append(server.engine.tokenizer.decode(request.tokens))
        text = f"Yes. <tool_call>{CALL}</tool_call>"
        for start in range(0, len(text), 7):
            last = start + 7 >= len(text)
            piece = OutputDelta(text[start : start + 7], None, "stop" if last else None)
            request.on_output(piece)
        return request

    server.engine.submit, server.plain = submit, plain
    yield server
    server.engine.submit = plain
    server.stop()


TALK = [{"role": "user", "content": "light please"}]


def test_the_openai_client_calls_tools(served):
    served.engine.tokenizer.chat_template = TEMPLATE
    with served.openai() as client:
        options = {"model": "base", "messages": TALK, "tools": [TOOL]}
        whole = client.chat.completions.create(**options).choices[0]
        assert whole.finish_reason == "tool_calls"
        assert whole.message.content == "Yes. "
        assert whole.message.tool_calls[0].function.name == "light"
        assert json.loads(whole.message.tool_calls[0].function.arguments) == {"on": True}
        assert "<tools>light</tools>" in served.prompts[-1]
        deltas = [
            chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)
        ]
        assert "".join(d.delta.content or "" for d in deltas) == "Yes. "
        calls = [call for d in deltas for call in d.delta.tool_calls or []]
        assert [(c.index, c.function.name) for c in calls] == [(0, "light")]
        assert deltas[-1].finish_reason == "tool_calls"
        answered = [
            *TALK,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [whole.message.tool_calls[0].model_dump()],
            },
            {"role": "tool", "tool_call_id": whole.message.tool_calls[0].id, "content": "done"},
        ]
        client.chat.completions.create(model="base", messages=answered, tools=[TOOL])
        assert "<tool_call>True</tool_call></s>" in served.prompts[-1]
        off = client.chat.completions.create(**options, tool_choice="none").choices[0]
        assert (off.finish_reason, off.message.tool_calls) == ("stop", None)
        assert "<tools>" not in served.prompts[-1]


LIGHT = {
    "type": "function",
    "function": {
        "name": "light",
        "parameters": {
            "type": "object",
            "properties": {"room": {"$ref": "#/$defs/Room"}, "on": {"type": "boolean"}},
            "required": ["room", "on"],
            "additionalProperties": False,
            "$defs": {"Room": {"enum": ["kitchen", "hall"]}},
        },
    },
}
TIMER = {"type": "function", "function": {"name": "timer"}}
TEMPLATES = {
    "none": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}",
    "hermes": TEMPLATE,
    "mistral": "{% if tools %}[TOOL_CALLS]{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
    "llama3": "{% if tools %}<|python_tag|>{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
}
NAMED = {"type": "function", "function": {"name": "light"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """A server of a random model, whose completions follow their grammar alone."""
    server = RunningServer(tmp_path_factory.mktemp("random"), max_model_len=1024)
    server.engine.eos_token_ids = {1}
    yield server
    server.stop()


def checked(call):
    """A call's name, after a check of its arguments."""
    arguments = json.loads(call.function.arguments)
    if call.function.name == "light":
        jsonschema.validate(arguments, LIGHT["function"]["parameters"])
    else:
        assert (call.function.name, arguments) == ("timer", {})
    return call.function.name


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("choice", ["required", NAMED, ALLOWED], ids=["required", "named", "some"])
def test_a_required_call_matches_its_schema(random_model, template, choice):
    random_model.engine.tokenizer.chat_template = TEMPLATES[template]
    options = {"model": "base", "messages": TALK, "tools": [LIGHT, TIMER], "tool_choice": choice}
    options |= {"max_tokens": 300, "parallel_tool_calls": False, "temperature": 1}
    with random_model.openai() as client:
        for seed in range(6):
            (found,) = client.chat.completions.create(**options, seed=seed).choices
            assert (found.finish_reason, found.message.content) == ("tool_calls", None)
            (call,) = found.message.tool_calls
            name = checked(call)
            assert choice == "required" or name == "light"
        chunks = list(client.chat.completions.create(**options, seed=5, stream=True))
        deltas = [d for chunk in chunks for d in chunk.choices[0].delta.tool_calls or []]
        assert "".join(d.function.arguments for d in deltas) == call.function.arguments
        assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_several_calls_and_a_cut_one(random_model):
    random_model.engine.tokenizer.chat_template = TEMPLATE
    options = {"model": "base", "messages": TALK, "tools": [LIGHT, TIMER], "temperature": 1}
    counts = set()
    with random_model.openai() as client:
        for seed in range(8):
            (found,) = client.chat.completions.create(
                **options, tool_choice="required", seed=seed, max_tokens=500
            ).choices
            assert all(map(checked, found.message.tool_calls))
            counts.add(len(found.message.tool_calls))
        assert len(counts) > 1
        (cut,) = client.chat.completions.create(
            **options, tool_choice="required", max_tokens=8
        ).choices
        assert (cut.finish_reason, cut.message.tool_calls) == ("length", None)


def test_a_model_may_call_a_tool_or_follow_the_response_format(random_model):
    random_model.engine.tokenizer.chat_template = TEMPLATE
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    schema["additionalProperties"] = False
    kinds = set()
    with random_model.openai() as client:
        for seed in range(12):
            (found,) = client.chat.completions.create(
                model="base",
                messages=TALK,
                tools=[LIGHT],
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": schema},
                },
                seed=seed,
                max_tokens=400,
            ).choices
            kinds.add(found.finish_reason)
            if found.finish_reason == "stop":
                jsonschema.validate(json.loads(found.message.content), schema)
            else:
                assert all(map(checked, found.message.tool_calls))
    assert kinds == {"stop", "tool_calls"}


def test_a_template_without_tools_gets_them_as_text(served):
    served.engine.tokenizer.chat_template = CHAT
    sent = [
        {"role": "system", "content": "Be brief."},
        *TALK,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "light", "arguments": "{}"}}
        ]},
        {"role": "tool", "tool_call_id": "a", "content": "done"},
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "twice"}]},
    ]  # fmt: skip
    talk = [Message.model_validate(message) for message in sent]
    encoder = PromptEncoder(served.engine)
    found = served.engine.tokenizer.decode(encoder.encode_chat(talk, [Tool(**TOOL)]))
    system, _, rest = found.partition("</s><|user|>light please</s>")
    assert system.startswith("<|system|>Be brief.\n\nYou may call tools.")
    assert '<tools>\n{"name": "light"' in system
    assert rest == (
        '<|assistant|><tool_call>\n{"name": "light", "arguments": {}}\n</tool_call></s>'
        "<|user|><tool_response>\ndone\n</tool_response>\n<tool_response>\ntwice\n"
        "</tool_response></s><|assistant|>"
    )


def test_wrong_tools_are_refused_by_name(served):
    served.engine.tokenizer.chat_template = TEMPLATE
    number = {"type": "function", "function": {"name": "x", "parameters": {"type": "number"}}}
    with served.http() as http:
        for param, why, change in (
            ("tool_choice", "there are no tools", {"tool_choice": "required"}),
            (
                "tool_choice",
                "'lamp' is none of the tools",
                {
                    "tools": [TOOL],
                    "tool_choice": {"type": "function", "function": {"name": "lamp"}},
                },
            ),
            ("tools", "an object is wanted", {"tools": [number], "tool_choice": "required"}),
            (
                "guided_regex",
                "only JSON may be combined with tools",
                {"tools": [TOOL], "guided_regex": "a"},
            ),
            (
                "response_format",
                "a tool must be called",
                {
                    "tools": [TOOL],
                    "tool_choice": "required",
                    "response_format": {"type": "json_object"},
                },
            ),
            (
                "chat_template_kwargs",
                "is no variable",
                {"chat_template_kwargs": {"tokenize": True}},
            ),
        ):
            refused = http.post(
                "/v1/chat/completions", json={"model": "base", "messages": TALK, **change}
            )
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
            assert why in refused.json()["error"]["message"]
        bad = [{"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "{"}}]}]
        refused = http.post("/v1/chat/completions", json={"model": "base", "messages": bad})
        assert "arguments of the call of 'x' are no JSON" in refused.json()["error"]["message"]
        empty = http.post(
            "/v1/chat/completions", json={"model": "base", "messages": [{"role": "user"}]}
        )
        assert (empty.status_code, "a text is wanted" in empty.text) == (400, True)


def test_variables_reach_the_template(served):
    served.engine.tokenizer.chat_template = "{{ mood }}{% if tools %}<tool_call>{% endif %}"
    with served.http() as http:
        body = {"model": "base", "messages": TALK, "chat_template_kwargs": {"mood": "please"}}
        assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert served.prompts[-1] == "please"
