"""The openai client: chat, tools, schemas, responses, batches, embeddings, log-probabilities."""

import io
import json
import sys
import time

import jsonschema
import openai
from pydantic import BaseModel

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0, timeout=900)
MODEL, TUNED = "smollm2", "tuned"
TALK = [{"role": "user", "content": "Turn on the light in the kitchen, please."}]


class Command(BaseModel):
    room: str
    on: bool


SCHEMA = {
    "type": "object",
    "properties": {"room": {"enum": ["kitchen", "hall"]}, "on": {"type": "boolean"}},
    "required": ["room", "on"],
    "additionalProperties": False,
}
FUNCTION = {"name": "set_light", "parameters": SCHEMA, "strict": True}
TOOL = {"type": "function", "function": FUNCTION}


def check_chat():
    for model in (MODEL, TUNED):
        options = {"model": model, "messages": TALK, "max_tokens": 12, "temperature": 0}
        whole = client.chat.completions.create(**options).choices[0].message.content
        stream = client.chat.completions.create(**options, stream=True)
        assert whole == "".join(c.choices[0].delta.content or "" for c in stream)
    scored = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    assert len(scored.choices[0].logprobs.content[0].top_logprobs) == 3
    assert [m.id for m in client.models.list()] == ["smollm2", "minilm", "tuned"]


def check_tools():
    options = {"model": MODEL, "tools": [TOOL], "max_tokens": 60, "parallel_tool_calls": False}
    for choice in ("required", {"type": "function", "function": {"name": "set_light"}}):
        reply = client.chat.completions.create(messages=TALK, tool_choice=choice, **options)
        message = reply.choices[0].message
        jsonschema.validate(json.loads(message.tool_calls[0].function.arguments), SCHEMA)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "done"}
    talk = [*TALK, message, result]
    assert client.chat.completions.create(messages=talk, **options).choices[0].message
    with client.chat.completions.stream(messages=TALK, tool_choice="required", **options) as stream:
        calls = stream.get_final_completion().choices[0].message.tool_calls
    jsonschema.validate(json.loads(calls[0].function.arguments), SCHEMA)


def check_schemas():
    parsed = client.chat.completions.parse(
        model=TUNED, messages=TALK, response_format=Command, max_tokens=80
    )
    assert isinstance(parsed.choices[0].message.parsed, Command)
    found = client.chat.completions.create(
        model=MODEL, messages=TALK, response_format={"type": "json_object"}, max_tokens=80
    ).choices[0]
    assert found.finish_reason == "length" or isinstance(json.loads(found.message.content), dict)


def check_responses():
    options = {"model": MODEL, "max_output_tokens": 60}
    assert client.responses.create(input="Say hello.", **options).output_text
    parsed = client.responses.parse(input=TALK, text_format=Command, **options)
    assert isinstance(parsed.output_parsed, Command)
    tool = {"type": "function", "name": "set_light", "parameters": SCHEMA, "strict": True}
    with client.responses.stream(
        input=TALK, tools=[tool], tool_choice="required", parallel_tool_calls=False, **options
    ) as stream:
        (call, *_) = stream.get_final_response().output
    jsonschema.validate(json.loads(call.arguments), SCHEMA)


def check_batches():
    rows = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions",
         "body": {"model": MODEL, "messages": TALK, "max_tokens": 4}}
        for i in range(4)
    ]  # fmt: skip
    data = "\n".join(map(json.dumps, rows)).encode()
    file = client.files.create(file=io.BytesIO(data), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    while batch.status not in ("completed", "failed"):
        time.sleep(0.5)
        batch = client.batches.retrieve(batch.id)
    results = client.files.content(batch.output_file_id).text.splitlines()
    assert {json.loads(row)["custom_id"] for row in results} == set("0123")


def check_others():
    vectors = client.embeddings.create(model="minilm", input=["a cat", "a dog"]).data
    assert len(vectors[0].embedding) == 384
    echoed = client.completions.create(
        model=MODEL, prompt="The sky is", echo=True, logprobs=1, max_tokens=0
    ).choices[0]
    assert echoed.text == "The sky is"
    assert echoed.logprobs.token_logprobs[0] is None
    try:
        client.completions.create(model=MODEL, prompt="word " * 9000)
    except openai.BadRequestError as error:
        assert (error.code, error.param) == ("context_length_exceeded", "prompt")


for check in (
    check_chat, check_tools, check_schemas, check_responses, check_batches, check_others,
):  # fmt: skip
    check()
    print(check.__name__, flush=True)
print("ok")
