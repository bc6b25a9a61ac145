"""ChatBuilder: responses of POST /v1/chat/completions."""

import uuid
from collections.abc import Sequence
from typing import Any

from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import (
    ChoiceDelta,
    ChoiceDeltaToolCall,
    ChoiceDeltaToolCallFunction,
)
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_message import ChatCompletionMessage
from openai.types.chat.chat_completion_message_function_tool_call import (
    ChatCompletionMessageFunctionToolCall,
)
from openai.types.chat.chat_completion_message_function_tool_call import (
    Function as CalledFunction,
)
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from veratune.serving.engine.requests import OutputDelta
from veratune.serving.engine.sampling import SampledToken
from veratune.serving.http.builders import ResponseBuilder, with_logprobs
from veratune.serving.http.tool_reader import ToolReader


class ChatBuilder(ResponseBuilder):
    """Chat completions, whole or as chunks."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: str, tools: ToolReader | None = None
    ) -> None:
        """Begin a response.

        Args:
            tokenizer: Turns token ids into text.
            model: The name that the client asked for.
            tools: Reads tool calls; None for a call without tools.
        """
        super().__init__(tokenizer, model)
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._tools = tools or ToolReader(None)

    def whole(self, outputs: Sequence[Sequence[OutputDelta]], usage: CompletionUsage) -> BaseModel:
        choices = [self._choice(index, deltas) for index, deltas in enumerate(outputs)]
        return ChatCompletion.model_construct(
            id=self.id,
            created=self.created,
            model=self.model,
            object="chat.completion",
            choices=choices,
            usage=usage,
        )

    def opening(self, index: int) -> list[BaseModel]:
        return [self._chunk([self._delta(index, ChoiceDelta(role="assistant", content=""))])]

    def chunks(
        self, index: int, delta: OutputDelta, usage: CompletionUsage | None = None
    ) -> list[BaseModel]:
        output, reason = self._tools.read(index, delta)
        content = ChoiceDelta(content=output.content) if output.content else ChoiceDelta()
        if output.calls:
            first = self._tools.calls[index] - len(output.calls)
            content.tool_calls = [
                ChoiceDeltaToolCall(
                    index=first + i,
                    id=call.id,
                    type="function",
                    function=ChoiceDeltaToolCallFunction(name=call.name, arguments=call.arguments),
                )
                for i, call in enumerate(output.calls)
            ]
        choice = self._delta(index, content, reason)
        if tokens := with_logprobs([delta]):
            choice.logprobs = ChunkLogprobs.model_construct(content=self._logprobs(tokens))
        return [self._chunk([choice], usage)]

    def closing(self, usage: CompletionUsage, include_usage: bool) -> list[BaseModel]:
        return [self._chunk([], usage)] if include_usage else []

    def _choice(self, index: int, deltas: Sequence[OutputDelta]) -> Choice:
        tokens = with_logprobs(deltas)
        outputs = [self._tools.read(index, delta) for delta in deltas]
        content = "".join(output.content for output, _ in outputs)
        calls = [
            ChatCompletionMessageFunctionToolCall(
                id=call.id,
                type="function",
                function=CalledFunction(name=call.name, arguments=call.arguments),
            )
            for output, _ in outputs
            for call in output.calls
        ]
        message = ChatCompletionMessage(role="assistant", content=content)
        if calls:
            message = ChatCompletionMessage(
                role="assistant", content=content or None, tool_calls=list(calls)
            )
        return Choice.model_construct(
            index=index,
            message=message,
            finish_reason=outputs[-1][1],
            logprobs=ChoiceLogprobs.model_construct(content=self._logprobs(tokens))
            if tokens
            else None,
        )

    def _delta(self, index: int, delta: ChoiceDelta, finish: str | None = None) -> ChunkChoice:
        return ChunkChoice.model_construct(index=index, delta=delta, finish_reason=finish)

    def _chunk(
        self, choices: list[ChunkChoice], usage: CompletionUsage | None = None
    ) -> ChatCompletionChunk:
        made = ChatCompletionChunk.model_construct(
            id=self.id,
            created=self.created,
            model=self.model,
            object="chat.completion.chunk",
            choices=choices,
        )
        if usage is not None:
            made.usage = usage
        return made

    def _logprobs(self, tokens: Sequence[SampledToken]) -> list[ChatCompletionTokenLogprob]:
        return [
            ChatCompletionTokenLogprob.model_construct(
                **self._entry(token.token_id, token.logprob),
                top_logprobs=[
                    TopLogprob.model_construct(**self._entry(*entry))
                    for entry in token.top_logprobs
                ],
            )
            for token in tokens
        ]

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = self.texts.bytes_of(token)
        return {
            "token": data.decode(errors="replace"),
            "logprob": logprob,
            "bytes": list(data),
        }
