"""Tool calls are read from three families' texts, and any split of a stream gives what the whole text gives."""

import json

import hypothesis
import pytest
from hypothesis import strategies

from tests.serving.http.fakes import RunningServer
from veratune.serving.engine.requests import OutputDelta
from veratune.serving.http.tools import NamedToolParser, family_of, make_parser

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


def test_a_named_tool_takes_the_whole_text():
    parser = NamedToolParser(["light"])
    assert parser.feed('{"on": ').content == ""
    parser.feed("true}")
    assert [(c.name, c.arguments) for c in parser.finish().calls] == [("light", '{"on": true}')]


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
    server = RunningServer(tmp_path_factory.mktemp("tools"))
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


def test_tools_that_the_model_cannot_have_are_refused(served):
    served.engine.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with served.http() as http:
        body = {"model": "base", "messages": TALK, "tools": [TOOL]}
        refused = http.post("/v1/chat/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")
        bad = [{"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "{"}}]}]
        refused = http.post("/v1/chat/completions", json={"model": "base", "messages": bad})
        assert "arguments of the call of 'x' are no JSON" in refused.json()["error"]["message"]
        empty = http.post(
            "/v1/chat/completions", json={"model": "base", "messages": [{"role": "user"}]}
        )
        assert (empty.status_code, "a text is wanted" in empty.text) == (400, True)
