"""OutputProcessor: from sampled tokens to the deltas that a caller gets."""

from typing import TYPE_CHECKING

from torch import Tensor

from veratune.serving.engine.requests import FinishReason, GenerationRequest, OutputDelta
from veratune.serving.engine.sampler import token_logprobs
from veratune.serving.engine.sampling import SampledToken
from veratune.serving.engine.sequence import SequenceState

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class OutputProcessor:
    """Detokenizes tokens and decides when a completion ends.

    Args:
        eos_token_ids: Tokens that end a completion, unless its request ignores them.
    """

    def __init__(self, eos_token_ids: set[int]) -> None:
        self.eos_token_ids = eos_token_ids

    def end_tokens(self, request: GenerationRequest) -> set[int]:
        """Return the tokens that end this request's completion."""
        eos = set() if request.sampling.ignore_eos else self.eos_token_ids
        return eos | set(request.sampling.stop_token_ids)

    def process(
        self, request: GenerationRequest, state: SequenceState, token: SampledToken
    ) -> OutputDelta:
        """Take a sampled token and return its delta, with a finish reason if it is the last one.

        Raises:
            UnsupportedError: the request's grammar became too complex.
        """
        token_id, text = token.token_id, state.detokenizer
        if token_id in self.end_tokens(request):
            request.end_token_id = token_id
            return OutputDelta(text.end(), None, "stop")
        request.output_token_ids.append(token_id)
        state.sampling.add(token_id)
        state.last_token = token_id
        piece = text.add(token_id)
        matcher = state.sampling.matcher
        if matcher is not None:
            matcher.accept(token_id)
        reason: FinishReason | None = None
        if text.stopped or (matcher is not None and matcher.finished):
            reason = "stop"
        elif len(request.output_token_ids) >= request.sampling.max_tokens:
            reason = "length"
        return OutputDelta(piece + text.end() if reason else piece, token, reason)


def eos_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the end-of-sequence tokens of the tokenizer and of the model's generation config."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


def add_prompt_logprobs(request: GenerationRequest, chunk: tuple[int, int], logits: Tensor) -> None:
    """Append the log-probabilities of the tokens that a chunk's positions predict.

    Args:
        request: Its prompt_logprobs grow.
        chunk: First and last (exclusive) token of the chunk.
        logits: (positions, vocab); the chunk's positions are the last ones.
    """
    start, end = chunk
    if start == 0:
        request.prompt_logprobs = [None]
    targets = list(request.tokens[start + 1 : end + 1])
    if targets:
        first = len(logits) - (end - start)
        counts = [request.sampling.prompt_logprobs or 0] * len(targets)
        scores = token_logprobs(logits[first : first + len(targets)], targets, counts)
        request.prompt_logprobs.extend(scores)
