"""litellm: chat, streams, tools, schemas, embeddings, and its class of a prompt that is too long."""

import json
import sys

import litellm

OPTIONS = {"api_base": sys.argv[1] + "/v1", "api_key": "none", "max_tokens": 60, "timeout": 900}
TALK = [{"role": "user", "content": "Turn on the light in the kitchen, please."}]
SCHEMA = {
    "type": "object",
    "properties": {"room": {"enum": ["kitchen", "hall"]}},
    "required": ["room"],
    "additionalProperties": False,
}

whole = litellm.completion(model="openai/tuned", messages=TALK, **OPTIONS)
assert whole.choices[0].message.content
chunks = litellm.completion(
    model="openai/smollm2", messages=TALK, stream=True, stream_options={"include_usage": True},
    **OPTIONS,
)  # fmt: skip
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
tool = {"type": "function", "function": {"name": "set_light", "parameters": SCHEMA}}
called = litellm.completion(
    model="openai/smollm2", messages=TALK, tools=[tool], tool_choice="required", **OPTIONS
)
arguments = json.loads(called.choices[0].message.tool_calls[0].function.arguments)
assert arguments["room"] in ("kitchen", "hall")
shaped = litellm.completion(
    model="openai/smollm2",
    messages=TALK,
    response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    **OPTIONS,
)
assert json.loads(shaped.choices[0].message.content)["room"] in ("kitchen", "hall")
found = litellm.text_completion(model="text-completion-openai/smollm2", prompt="Hello", **OPTIONS)
assert found.choices[0].text
vectors = litellm.embedding(
    model="openai/minilm", input=["a cat"], api_base=OPTIONS["api_base"], api_key="none"
)
assert len(vectors.data[0]["embedding"]) == 384
try:
    litellm.completion(
        model="openai/smollm2", messages=[{"role": "user", "content": "word " * 9000}], **OPTIONS
    )
except litellm.ContextWindowExceededError:
    print("ok")
