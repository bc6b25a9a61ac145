"""The Responses API with the openai client: text, tools, schemas, streams."""

import json

import jsonschema
import openai
import pytest
from openai.types.responses import Response
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from tests import fakes
from tests.serving.http.fakes import RunningServer, greedy
from veratune.serving.http.fields import HARMLESS, REFUSED
from veratune.serving.http.responses_input import messages_of
from veratune.serving.http.schemas.responses import ResponsesBody

LIGHT = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "light", "description": "switch", "parameters": LIGHT}
TOOL["strict"] = True


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    server = RunningServer(tmp_path_factory.mktemp("responses"), max_model_len=1024)
    yield server
    server.stop()


def test_a_text_and_its_stream(served):
    tokenizer = fakes.tokenizer()
    talk = [{"role": "system", "content": "please"}, {"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    wanted = greedy(None, tokenizer(text, add_special_tokens=False)["input_ids"])
    options = {"model": "base", "input": "hi", "instructions": "please", "temperature": 0}
    with served.openai() as client:
        whole = client.responses.create(**options, max_output_tokens=8, metadata={"a": "b"})
        assert whole.output_text == wanted
        assert (whole.status in ("completed", "incomplete"), whole.metadata) == (True, {"a": "b"})
        assert whole.usage.output_tokens == 8 or whole.status == "completed"
        events = list(client.responses.create(**options, max_output_tokens=8, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == wanted
        assert events[-1].response.output_text == wanted
        kinds = list(dict.fromkeys(event.type for event in events))
        assert kinds[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        with client.responses.stream(**options, max_output_tokens=8) as stream:
            assert "".join(e.delta for e in stream if e.type == "response.output_text.delta") == (
                wanted
            )
        cut = client.responses.create(**options, max_output_tokens=1)
        assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        scored = client.responses.create(
            **options, max_output_tokens=2, include=["message.output_text.logprobs"], top_logprobs=2
        )
        assert len(scored.output[0].content[0].logprobs[0].top_logprobs) == 2


def test_the_response_is_what_the_api_defines(served):
    with served.http() as http:
        body = {"model": "base", "input": "hi", "max_output_tokens": 4, "tools": [TOOL]}
        Response.model_validate(http.post("/v1/responses", json=body).json(), strict=False)


def test_tools_and_their_history(served):
    options = {"model": "base", "tools": [TOOL], "tool_choice": "required"}
    options |= {"parallel_tool_calls": False, "max_output_tokens": 200}
    with served.openai() as client:
        first = client.responses.create(**options, input="light please")
        (call,) = first.output
        assert (call.type, call.name, first.output_text) == ("function_call", "light", "")
        jsonschema.validate(json.loads(call.arguments), LIGHT)
        events = list(client.responses.create(**options, input="light please", stream=True))
        done = [e for e in events if e.type == "response.function_call_arguments.done"]
        assert json.loads(done[0].arguments)["on"] in (True, False)
        assert events[-1].response.output[0].name == "light"
        talk = [{"role": "user", "content": [{"type": "input_text", "text": "light please"}]}]
        talk += [call.model_dump()]
        talk += [{"type": "function_call_output", "call_id": call.call_id, "output": "done"}]
        named = {"type": "function", "name": "light"}
        again = client.responses.create(**options | {"tool_choice": named}, input=talk)
        assert again.output[0].name == "light"
        some = {"type": "allowed_tools", "mode": "required", "tools": [named]}
        assert client.responses.create(**options | {"tool_choice": some}, input=talk).output
    body = ResponsesBody.model_validate({"model": "x", "input": talk, "instructions": "brief"})
    messages = messages_of(body)
    assert [m.role for m in messages] == ["system", "user", "assistant", "tool"]
    assert messages[2].tool_calls[0].id == messages[3].tool_call_id == call.call_id


def test_a_schema(served):
    with served.openai() as client:
        found = client.responses.create(
            model="base",
            input="light please",
            max_output_tokens=200,
            text={"format": {"type": "json_schema", "name": "light", "schema": LIGHT}},
        )
        jsonschema.validate(json.loads(found.output_text), LIGHT)


def test_what_is_not_kept_or_not_known_is_refused(served):
    with served.openai() as client:
        for why, options in (
            ("responses are not kept here", {"previous_response_id": "resp_1"}),
            ("responses are not kept here", {"conversation": "conv_1"}),
            ("background: it is not supported", {"background": True}),
            ("tools", {"tools": [{"type": "web_search"}]}),
            ("input", {"input": [{"type": "item_reference", "id": "x"}]}),
            ("at least one item", {"input": []}),
        ):
            with pytest.raises(openai.BadRequestError, match=why):
                client.responses.create(**{"model": "base", "input": "hi", **options})


def test_every_field_of_the_client_is_known():
    known = set(ResponsesBody.model_fields) | HARMLESS | set(REFUSED)
    assert set(ResponseCreateParamsBase.__annotations__) <= known
