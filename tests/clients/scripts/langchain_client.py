"""langchain-openai: bind_tools with its history, with_structured_output, streams, embeddings."""

import sys
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

OPTIONS = {"base_url": sys.argv[1] + "/v1", "api_key": "none"}
model = ChatOpenAI(model="smollm2", max_tokens=80, timeout=900, **OPTIONS)
question = HumanMessage("Turn on the light in the kitchen, please.")


class Command(BaseModel):
    """A command to a house."""

    room: Literal["kitchen", "hall"]
    on: bool


@tool
def set_light(room: Literal["kitchen", "hall"], on: bool) -> str:
    """Switch the light of a room."""
    return "done"


assert model.invoke([question]).content
assert "".join(str(chunk.content) for chunk in model.stream([question]))
called = model.bind_tools([set_light], tool_choice="any").invoke([question])
(call, *_) = called.tool_calls
result = set_light.invoke(call)
assert isinstance(result, ToolMessage)
assert model.bind_tools([set_light]).invoke([question, called, result]) is not None
for method in ("json_schema", "function_calling"):
    found = model.with_structured_output(Command, method=method).invoke([question])
    assert isinstance(found, Command), method
vectors = OpenAIEmbeddings(
    model="minilm", check_embedding_ctx_length=False, **OPTIONS
).embed_documents(["a cat", "a dog"])
assert len(vectors[1]) == 384
print("ok")
