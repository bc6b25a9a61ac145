"""SequenceState: what the engine keeps of one request while it runs; RunningBatch: which run."""

import dataclasses

from torch import Tensor

from veratune.serving.engine.detokenizer import Detokenizer
from veratune.serving.engine.kv_cache import KVCache
from veratune.serving.engine.requests import GenerationRequest
from veratune.serving.engine.sampler import SamplingState


@dataclasses.dataclass
class SequenceState:
    """State of one sequence.

    Args:
        sampling: Penalties, biases, random numbers and grammar.
        detokenizer: Turns its tokens into text.
        prefilled: Tokens of the prompt that the KV cache has.
        last_token: The token that the next step feeds.
        saved: KV cache of a paused sequence; None while it runs.
    """

    sampling: SamplingState
    detokenizer: Detokenizer
    prefilled: int = 0
    last_token: int = 0
    saved: list[tuple[Tensor, Tensor]] | None = None
    saved_length: int = 0


class RunningBatch:
    """The running requests, in the order of their rows in the KV cache.

    Decoding sequences come first, prefilling ones behind them, so that either kind is a contiguous
    block of the cache.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.requests: list[GenerationRequest] = []
        self.states: dict[GenerationRequest, SequenceState] = {}
        self.decoding = 0

    def __len__(self) -> int:
        return len(self.requests)

    def __contains__(self, request: GenerationRequest) -> bool:
        return request in self.states

    @property
    def prefilling(self) -> list[GenerationRequest]:
        """Requests whose prompts are being prefilled."""
        return self.requests[self.decoding :]

    def row(self, request: GenerationRequest) -> int:
        """Return the row of a request in the KV cache."""
        return self.requests.index(request)

    def add(self, request: GenerationRequest, state: SequenceState) -> None:
        """Append a request as a prefilling one; a paused one gets its KV cache back."""
        row = len(self.requests)
        self.requests.append(request)
        self.states[request] = state
        if state.saved is not None:
            self.cache.restore(row, state.saved, state.saved_length)
            state.saved = None
            if state.prefilled == len(request.tokens):
                self.start_decoding(request)

    def start_decoding(self, request: GenerationRequest) -> None:
        """Move a request whose prompt is prefilled to the decoding ones."""
        self.swap(self.row(request), self.decoding)
        self.decoding += 1

    def pause(self, request: GenerationRequest) -> SequenceState:
        """Remove a request and return its state with a copy of its KV cache."""
        row, state = self.row(request), self.states[request]
        state.saved, state.saved_length = self.cache.save(row), self.cache.lengths[row]
        self.remove(request)
        return state

    def remove(self, request: GenerationRequest) -> None:
        """Swap-remove a request, keeping decoding sequences before prefilling ones."""
        row, last = self.row(request), len(self.requests) - 1
        if row < self.decoding:
            self.decoding -= 1
            self.swap(row, self.decoding)
            row = self.decoding
        self.swap(row, last)
        self.cache.free(last)
        self.requests.pop()
        del self.states[request]

    def swap(self, first: int, second: int) -> None:
        """Exchange two rows."""
        if first != second:
            self.cache.swap(first, second)
            rows = self.requests
            rows[first], rows[second] = rows[second], rows[first]
