"""ServingEngine: what the server needs of an engine, whether it generates or encodes."""

from typing import TYPE_CHECKING, Protocol, TypeVar

from veratune.serving.engine.lifecycle import EngineStats
from veratune.serving.engine.requests import BaseRequest
from veratune.serving.engine.scheduler import Scheduler, SchedulerConfig
from veratune.serving.pool.lease import Key
from veratune.serving.pool.pool import AdapterPool

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

R = TypeVar("R", bound="BaseRequest")  # type: ignore[type-arg]


class ServingEngine(Protocol[R]):
    """One model with a pool of adapters that answers requests (see `Engine` and `Encoder`)."""

    config: SchedulerConfig
    max_model_len: int
    pool: AdapterPool

    @property
    def model(self) -> "PreTrainedModel": ...

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase": ...

    @property
    def scheduler(self) -> Scheduler[R]: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def alive(self) -> bool: ...

    @property
    def prefix_cache_bytes(self) -> int: ...

    def check(self, request: R) -> None: ...

    def submit(self, request: R) -> R: ...

    def cancel(self, request: R) -> None: ...

    def start(self) -> None: ...

    def close(self, timeout: float = ...) -> None: ...

    def forget(self, key: Key) -> None: ...

    def step(self) -> bool: ...
