"""Shapes of generated responses: chat completions and completions, whole and streamed."""

import abc
import time
import uuid
from collections.abc import Sequence
from typing import Any

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_message import ChatCompletionMessage
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from veratune.serving.engine.engine import GenerationRequest, OutputDelta
from veratune.serving.engine.sampling import SampledToken


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
        self.tokenizer, self.model = tokenizer, model
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

    def token_text(self, token: int) -> str:
        """A token as text."""
        return str(self.tokenizer.decode([token]))


class ChatFormat(ResponseFormat):
    """POST /v1/chat/completions."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
        super().__init__(tokenizer, model)
        self.id = f"chatcmpl-{uuid.uuid4().hex}"

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
        content = ChoiceDelta(content=delta.text) if delta.text else ChoiceDelta()
        choice = self._delta(index, content, delta.finish_reason)
        if tokens := with_logprobs([delta]):
            choice.logprobs = ChunkLogprobs.model_construct(content=self._logprobs(tokens))
        return self._chunk([choice])

    def usage_chunk(self, usage: CompletionUsage) -> BaseModel:
        return self._chunk([], usage=usage)

    def _choice(self, index: int, deltas: Sequence[OutputDelta]) -> Choice:
        tokens = with_logprobs(deltas)
        content = "".join(delta.text for delta in deltas)
        return Choice.model_construct(
            index=index,
            message=ChatCompletionMessage(role="assistant", content=content),
            finish_reason=deltas[-1].finish_reason,
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
        text = self.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class CompletionFormat(ResponseFormat):
    """POST /v1/completions."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
        super().__init__(tokenizer, model)
        self.id = f"cmpl-{uuid.uuid4().hex}"

    def whole(self, outputs: Sequence[Sequence[OutputDelta]], usage: CompletionUsage) -> BaseModel:
        choices = [self._choice(index, deltas) for index, deltas in enumerate(outputs)]
        return self._completion(choices, usage=usage)

    def chunk(self, index: int, delta: OutputDelta) -> BaseModel:
        return self._completion([self._choice(index, [delta])])

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

    def _choice(self, index: int, deltas: Sequence[OutputDelta]) -> CompletionChoice:
        return CompletionChoice.model_construct(
            index=index,
            text="".join(delta.text for delta in deltas),
            finish_reason=deltas[-1].finish_reason,
            logprobs=self._logprobs(with_logprobs(deltas)),
        )

    def _logprobs(self, tokens: Sequence[SampledToken]) -> Logprobs | None:
        if not tokens:
            return None
        return Logprobs.model_construct(
            tokens=[self.token_text(token.token_id) for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[
                {self.token_text(other): value for other, value in token.top_logprobs}
                for token in tokens
            ],
            text_offset=[],
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
