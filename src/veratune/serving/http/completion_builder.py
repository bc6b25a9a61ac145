"""CompletionBuilder: responses of POST /v1/completions."""

import uuid
from collections.abc import Sequence

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.completion_choice import Logprobs
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from veratune.serving.engine.requests import GenerationRequest, OutputDelta
from veratune.serving.engine.sampling import SampledToken
from veratune.serving.http.builders import ResponseBuilder, with_logprobs


class CompletionBuilder(ResponseBuilder):
    """Completions, whole or as chunks."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: str,
        requests: Sequence[GenerationRequest],
        echoes: Sequence[str] | None = None,
    ) -> None:
        """Begin a response.

        Args:
            tokenizer: Turns token ids into text.
            model: The name that the client asked for.
            requests: One a choice.
            echoes: The prompt of each choice, which its text begins with; None for no echo.
        """
        super().__init__(tokenizer, model)
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._requests, self._echoes = requests, echoes
        self._offsets = [0] * len(requests)  # characters sent so far
        self._partial = [b""] * len(requests)  # bytes of a character whose end has not come
        self._begun: set[int] = set()

    def whole(self, outputs: Sequence[Sequence[OutputDelta]], usage: CompletionUsage) -> BaseModel:
        choices = [self._choice(index, deltas) for index, deltas in enumerate(outputs)]
        return self._completion(choices, usage)

    def chunks(
        self, index: int, delta: OutputDelta, usage: CompletionUsage | None = None
    ) -> list[BaseModel]:
        return [self._completion([self._choice(index, [delta])], usage)]

    def closing(self, usage: CompletionUsage, include_usage: bool) -> list[BaseModel]:
        return [self._completion([], usage)] if include_usage else []

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
        text = "".join(delta.text for delta in deltas)
        echoed: list[SampledToken] = []
        if self._echoes is not None and index not in self._begun:
            text = self._echoes[index] + text
            request = self._requests[index]
            if request.sampling.prompt_logprobs is not None:
                echoed = [
                    score or SampledToken(token)
                    for token, score in zip(request.tokens, request.prompt_logprobs, strict=True)
                ]
        first = index not in self._begun
        self._begun.add(index)
        return CompletionChoice.model_construct(
            index=index,
            text=text,
            finish_reason=deltas[-1].finish_reason,
            logprobs=self._logprobs(index, [*echoed, *with_logprobs(deltas)], first and text),
        )

    def _logprobs(
        self, index: int, tokens: Sequence[SampledToken], start: str | bool
    ) -> Logprobs | None:
        """Log-probabilities of tokens; `start` is the text so far at the start of a choice."""
        if not tokens:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            if self.texts.is_special(token.token_id):
                continue  # not in the text
            data = self._partial[index] + self.texts.bytes_of(token.token_id)
            if start and not str(start).startswith(" "):
                data = data.removeprefix(b" ")  # SentencePiece begins a text with a space
            start = False
            whole = data.decode(errors="ignore")
            cut = len(data) - len(whole.encode())
            self._partial[index] = data[len(data) - cut :] if 0 < cut < 4 else b""
            self._offsets[index] += len(whole)
        return Logprobs.model_construct(
            tokens=[self.texts.name_of(token.token_id) for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[
                None
                if token.logprob is None
                else {self.texts.name_of(other): value for other, value in token.top_logprobs}
                for token in tokens
            ],
            text_offset=offsets,
        )
