"""instructor: pydantic models from tool calls and from JSON schemas."""

import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel


class Command(BaseModel):
    room: Literal["kitchen", "hall"]
    on: bool


plain = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", timeout=900)
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(plain, mode=mode)
    found = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Turn on the light in the kitchen, please."}],
        response_model=Command,
        max_tokens=80,
        max_retries=0,
    )
    assert isinstance(found, Command), mode
    print(mode, found, flush=True)
print("ok")
