"""Requests: what a caller asks of an engine, and the outputs that come back."""

import abc
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Literal, TypeVar

from veratune.adapter import Adapter
from veratune.errors import ShutdownError
from veratune.serving.engine.grammar import Grammar, GrammarMatcher
from veratune.serving.engine.sampling import SampledToken, SamplingParams
from veratune.serving.pool.lease import Key, Lease

FinishReason = Literal["stop", "length", "cancelled"]
T = TypeVar("T")


@dataclasses.dataclass(eq=False)
class BaseRequest(abc.ABC, Generic[T]):
    """One request of one tenant. Each output, or the error that ends it, goes to `on_output`.

    Args:
        tenant: Owner of the request; tenants share the engine fairly.
        key: Key of the adapter in the pool (see `AdapterPool.acquire`); None: the base model.
        load: Reads the adapter if the pool does not hold it.
        arrival_time: When the request was made, in seconds of `time.perf_counter`, as below.
        adapter_ready_time: When its adapter was in memory.
        first_token_time: When its first output was computed.
        finished_time: When it ended.
    """

    tenant: str
    key: Key | None = dataclasses.field(default=None, kw_only=True)
    load: Callable[[], Adapter] | None = dataclasses.field(default=None, kw_only=True)
    arrival_time: float = dataclasses.field(default_factory=time.perf_counter, kw_only=True)
    adapter_ready_time: float | None = dataclasses.field(default=None, kw_only=True)
    first_token_time: float | None = dataclasses.field(default=None, kw_only=True)
    finished_time: float | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self.cancelled = threading.Event()
        self.outputs: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
        self.on_output: Callable[[T | BaseException], object] = self.outputs.put
        self.lease: Lease | None = None

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """The most tokens that the request may take, prompt and completion."""

    def prepare(self) -> None:
        """Do the request's own slow work before it runs, outside the engine's thread."""

    @property
    def needs_preparation(self) -> bool:
        """Whether `prepare` has work to do."""
        return False

    def report_cancelled(self) -> None:
        """Send the output that says that the request was cancelled."""
        self.on_output(ShutdownError("the request was cancelled"))


@dataclasses.dataclass(frozen=True)
class OutputDelta:
    """New text of a completion, and the token that it came with.

    Args:
        text: New text; may be empty, as incomplete characters and possible stops are held back.
        token: The sampled token; None in a last delta without one.
        finish_reason: Why the completion ended; set in the last delta.
    """

    text: str
    token: SampledToken | None = None
    finish_reason: FinishReason | None = None


@dataclasses.dataclass(eq=False)
class GenerationRequest(BaseRequest[OutputDelta]):
    """A prompt to complete. Iterating gives its `OutputDelta`s and raises its error.

    Args:
        tokens: Token ids of the prompt.
        sampling: How the completion is sampled.
        grammar: A compiled grammar that the completion must follow.
        continues_text: Whether the completion's text continues the prompt's; False for a message
            of its own.

    Attributes:
        output_token_ids: Token ids of the completion so far.
        end_token_id: The token that ended the completion, which is no part of it; None for another
            end.
        cached_tokens: Prompt tokens whose KV cache came from an earlier request.
        prompt_logprobs: Log-probability of each prompt token (None for the first one), where
            `sampling.prompt_logprobs` asks for them; complete before the first output.
    """

    tokens: Sequence[int]
    sampling: SamplingParams
    grammar: Grammar | None = None
    continues_text: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.output_token_ids: list[int] = []
        self.end_token_id: int | None = None
        self.cached_tokens = 0
        self.prompt_logprobs: list[SampledToken | None] = []
        self.matcher: GrammarMatcher | None = None

    @property
    def size(self) -> int:
        return len(self.tokens) + self.sampling.max_tokens

    @property
    def needs_preparation(self) -> bool:
        return self.grammar is not None and self.matcher is None

    def prepare(self) -> None:
        if self.grammar is not None and self.matcher is None:
            self.matcher = self.grammar.matcher()

    def report_cancelled(self) -> None:
        self.on_output(OutputDelta("", None, "cancelled"))

    def __iter__(self) -> Iterator[OutputDelta]:
        while True:
            delta = self.outputs.get()
            if isinstance(delta, BaseException):
                raise delta
            yield delta
            if delta.finish_reason is not None:
                return

    def result(self) -> str:
        """Return the text of the whole completion; raises the request's error."""
        return "".join(delta.text for delta in self)
