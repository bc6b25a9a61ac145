"""ResponseBuilder: from the output of an engine to the JSON of one call, whole or streamed."""

import abc
import json
import time
from collections.abc import Sequence

from openai.types import CompletionUsage
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from veratune.serving.engine.requests import GenerationRequest, OutputDelta
from veratune.serving.engine.sampling import SampledToken
from veratune.serving.http.errors import ApiError
from veratune.serving.http.token_text import TokenTexts


class ResponseBuilder(abc.ABC):
    """Turns the output of an engine into the JSON of one call.

    Values are put into OpenAI's own response classes without validation: they were made here.
    """

    end_of_stream = "data: [DONE]\n\n"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
        """Begin a response.

        Args:
            tokenizer: Turns token ids into text.
            model: The name that the response gives.
        """
        self.texts, self.model = TokenTexts(tokenizer), model
        self.created = int(time.time())

    @abc.abstractmethod
    def whole(self, outputs: Sequence[Sequence[OutputDelta]], usage: CompletionUsage) -> BaseModel:
        """The response, from all deltas of all choices."""

    @abc.abstractmethod
    def chunks(
        self, index: int, delta: OutputDelta, usage: CompletionUsage | None = None
    ) -> list[BaseModel]:
        """The events of one delta; each has the usage so far if that is given."""

    @abc.abstractmethod
    def closing(self, usage: CompletionUsage, include_usage: bool) -> list[BaseModel]:
        """The events after the last delta."""

    def opening(self, index: int) -> list[BaseModel]:
        """The first events of a choice, before any token."""
        return []

    def event(self, content: BaseModel) -> str:
        """A server-sent event."""
        return f"data: {json.dumps(dump(content))}\n\n"

    def error_event(self, error: ApiError) -> str:
        """The event of an error within a stream."""
        return f"data: {json.dumps(error.body())}\n\n"


def dump(response: BaseModel) -> dict[str, object]:
    """A response as JSON, with the fields that were set."""
    return response.model_dump(mode="json", exclude_unset=True, warnings=False, by_alias=True)


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
