"""Shapes of generated responses: chat completions and completions, whole and streamed."""

import abc
import dataclasses
import itertools
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from openai.types import Completion, CompletionChoice, CompletionUsage
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
from openai.types.completion_choice import Logprobs
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from veratune.serving.engine.requests import GenerationRequest, OutputDelta
from veratune.serving.engine.sampling import SampledToken
from veratune.serving.http.token_text import TokenTexts
from veratune.serving.http.tools import ToolOutput, ToolParser


class ResponseFormat(abc.ABC):
    """Turns the output of an engine into the JSON of one call.

    Values are put into OpenAI's own response classes without validation: they were made here.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
        """Begin a response.

        Args:
            tokenizer: Turns token ids into text.
            model: The name that the client asked for.
        """
        self.texts, self.model = TokenTexts(tokenizer), model
        self.created = int(time.time())

    @abc.abstractmethod
    def whole(self, outputs: Sequence[Sequence[OutputDelta]], usage: CompletionUsage) -> BaseModel:
        """The response, from all deltas of all choices."""

    @abc.abstractmethod
    def chunk(self, index: int, delta: OutputDelta) -> BaseModel:
        """One event of a stream."""

    @abc.abstractmethod
    def usage_chunk(self, usage: CompletionUsage) -> BaseModel:
        """The last event of a stream with include_usage."""

    def opening(self, index: int) -> BaseModel | None:
        """The first event of a choice, before any token."""
        return None


class ChatFormat(ResponseFormat):
    """POST /v1/chat/completions."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: str,
        make_tool_parser: Callable[[], ToolParser] | None = None,
        parallel_tool_calls: bool = True,
    ) -> None:
        """Begin a response.

        Args:
            tokenizer: Turns token ids into text.
            model: The name that the client asked for.
            make_tool_parser: Makes a parser for each choice; None for a call without tools.
            parallel_tool_calls: Whether a choice may have more than one tool call.
        """
        super().__init__(tokenizer, model)
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._make_parser, self._parallel = make_tool_parser, parallel_tool_calls
        self._parsers: dict[int, ToolParser] = {}
        self._calls: dict[int, int] = {}  # calls so far, by choice

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

    def opening(self, index: int) -> BaseModel | None:
        return self._chunk([self._delta(index, ChoiceDelta(role="assistant", content=""))])

    def chunk(self, index: int, delta: OutputDelta) -> BaseModel:
        output, reason = self._parse(index, delta)
        content = ChoiceDelta(content=output.content) if output.content else ChoiceDelta()
        if output.calls:
            first = self._calls[index] - len(output.calls)
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
        return self._chunk([choice])

    def usage_chunk(self, usage: CompletionUsage) -> BaseModel:
        return self._chunk([], usage=usage)

    def _choice(self, index: int, deltas: Sequence[OutputDelta]) -> Choice:
        tokens = with_logprobs(deltas)
        outputs = [self._parse(index, delta) for delta in deltas]
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

    def _parse(self, index: int, delta: OutputDelta) -> tuple[ToolOutput, str | None]:
        """Return a delta's content and its finish reason."""
        if self._make_parser is None:
            return ToolOutput(delta.text), delta.finish_reason
        if index not in self._parsers:
            self._parsers[index] = self._make_parser()
        output = self._parsers[index].feed(delta.text)
        if delta.finish_reason is not None:
            end = self._parsers[index].finish()
            output = ToolOutput(output.content + end.content, output.calls + end.calls)
        before = self._calls.get(index, 0)
        if not self._parallel:
            output = dataclasses.replace(output, calls=output.calls[: max(0, 1 - before)])
        self._calls[index] = before + len(output.calls)
        if delta.finish_reason == "stop" and self._calls[index]:
            return output, "tool_calls"
        return output, delta.finish_reason

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


class CompletionFormat(ResponseFormat):
    """POST /v1/completions."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
        super().__init__(tokenizer, model)
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._offsets: dict[int, int] = {}  # characters streamed so far, by choice

    def whole(self, outputs: Sequence[Sequence[OutputDelta]], usage: CompletionUsage) -> BaseModel:
        choices = [self._choice(index, deltas) for index, deltas in enumerate(outputs)]
        return self._completion(choices, usage=usage)

    def chunk(self, index: int, delta: OutputDelta) -> BaseModel:
        offset = self._offsets.get(index, 0)
        for token in with_logprobs([delta]):
            self._offsets[index] = offset + len(self.texts.text_of(token.token_id))
        return self._completion([self._choice(index, [delta], offset)])

    def usage_chunk(self, usage: CompletionUsage) -> BaseModel:
        return self._completion([], usage=usage)

    def _completion(
        self, choices: list[CompletionChoice], usage: CompletionUsage | None = None
    ) -> Completion:
        made = Completion.model_construct(
            id=self.id,
            created=self.created,
            model=self.model,
            object="text_completion",
            choices=choices,
        )
        if usage is not None:
            made.usage = usage
        return made

    def _choice(
        self, index: int, deltas: Sequence[OutputDelta], offset: int = 0
    ) -> CompletionChoice:
        return CompletionChoice.model_construct(
            index=index,
            text="".join(delta.text for delta in deltas),
            finish_reason=deltas[-1].finish_reason,
            logprobs=self._logprobs(with_logprobs(deltas), offset),
        )

    def _logprobs(self, tokens: Sequence[SampledToken], offset: int = 0) -> Logprobs | None:
        if not tokens:
            return None
        words = [self.texts.text_of(token.token_id) for token in tokens]
        lengths = map(len, words[:-1])
        return Logprobs.model_construct(
            tokens=words,
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[
                {self.texts.text_of(other): value for other, value in token.top_logprobs}
                for token in tokens
            ],
            text_offset=list(itertools.accumulate(lengths, initial=offset)),
        )


def usage_of(requests: Sequence[GenerationRequest], n: int) -> CompletionUsage:
    """The usage of a call.

    Args:
        requests: All requests of the call, `n` for each prompt in a row.
        n: Choices of each prompt; the prompt counts once.
    """
    prompts = requests[::n]
    prompt_tokens = sum(len(request.tokens) for request in prompts)
    completion_tokens = sum(len(request.output_token_ids) for request in requests)
    cached = sum(request.cached_tokens for request in prompts)
    return CompletionUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


def with_logprobs(deltas: Sequence[OutputDelta]) -> list[SampledToken]:
    """The tokens whose log probabilities the client asked for."""
    tokens = (delta.token for delta in deltas)
    return [token for token in tokens if token is not None and token.logprob is not None]
