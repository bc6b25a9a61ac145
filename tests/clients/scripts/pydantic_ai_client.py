"""pydantic-ai: typed output through a tool and through a schema, a tool call, and a stream."""

import asyncio
import sys
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=sys.argv[1] + "/v1", api_key="none")
settings = {"max_tokens": 100, "timeout": 900}
QUESTION = "Turn on the light in the kitchen, please."


class Command(BaseModel):
    room: Literal["kitchen", "hall"]
    on: bool


for kind in (OpenAIChatModel, OpenAIResponsesModel):
    model = kind("smollm2", provider=provider)
    for output in (Command, NativeOutput(Command)):
        agent = Agent(model, output_type=output, model_settings=settings, retries=0)
        assert isinstance(agent.run_sync(QUESTION).output, Command)
        print(kind.__name__, output, flush=True)
    agent = Agent(model, model_settings=settings)

    @agent.tool_plain
    def weather(city: str) -> str:
        """The weather of a city."""
        return "sunny"

    assert isinstance(agent.run_sync(QUESTION).output, str)

    async def stream(agent=agent):
        async with agent.run_stream(QUESTION) as result:
            return [text async for text in result.stream_text(delta=True)]

    assert asyncio.run(stream())
print("ok")
