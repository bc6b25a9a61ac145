"""Scheduler: whose request is next, and which requests are too many. No tensors in here.

Each tenant has a queue; tenants take turns, so that one who asks a lot waits behind their own requests and not everybody behind
theirs.
"""

import collections
import dataclasses
import threading
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from veratune.errors import ConfigError, QueueFullError


class Schedulable(Protocol):
    """What the scheduler knows of a request. tenant: who asks; size: the most tokens it may take, prompt and answer."""

    @property
    def tenant(self) -> str: ...

    @property
    def size(self) -> int: ...


R = TypeVar("R", bound=Schedulable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """rows: requests that run at once; waiting: requests in all queues; waiting_tenant: in one of them; tokens: of all that run and wait
    together, prompts and the most they may answer.
    """

    max_num_seqs: int = 32
    max_queue: int = 512
    max_queue_per_tenant: int = 64
    max_total_tokens: int = 1_000_000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(
                    f"{field.name} is {getattr(self, field.name)}; it must be at least 1"
                )


def select_prefill_batch(sizes: Sequence[int], most: int) -> list[int]:
    """Which texts of a queue, by their numbers of tokens, one pass reads: the first one, and those behind it that fit beside it. Padded to the
    longest they have at most `most` tokens, of which at most a quarter are padding.

    >>> select_prefill_batch([30, 200, 32, 2, 28], 128)
    [0, 2, 4]
    """
    chosen = [0]
    for i in range(1, len(sizes)):
        own = [sizes[k] for k in (*chosen, i)]
        area = max(own) * len(own)
        if area <= most and sum(own) >= 0.75 * area:
            chosen.append(i)
    return chosen


class Scheduler(Generic[R]):
    """Requests that wait and requests that run. Every method may be called from any thread.

    `add` refuses what is too much, `take` says who runs next, `done` ends a request that ran, and `withdraw` one that may still wait.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._queues: collections.OrderedDict[str, collections.deque[R]] = collections.OrderedDict()
        self._running: list[R] = []
        self._tokens = 0
        self._lock = threading.RLock()
        self._news = threading.Event()

    @property
    def waiting(self) -> int:
        """How many wait."""
        with self._lock:
            return sum(len(queue) for queue in self._queues.values())

    @property
    def running(self) -> int:
        """How many run."""
        return len(self._running)

    def add(self, request: R) -> None:
        """Put a request at the end of its tenant's queue. Raises QueueFullError, naming the bound that it is over."""
        limits = self.config
        with self._lock:
            own = len(self._queues.get(request.tenant, ()))
            if own >= limits.max_queue_per_tenant:
                raise QueueFullError(
                    f"{own} requests of this tenant are waiting already; try again later"
                )
            if self.waiting >= limits.max_queue:
                raise QueueFullError(
                    f"{self.waiting} requests are waiting already; try again later"
                )
            if self._tokens + request.size > limits.max_total_tokens and self._tokens:
                raise QueueFullError(
                    f"{self._tokens} tokens are being worked on or wait already; try again later"
                )
            self._queues.setdefault(request.tenant, collections.deque()).append(request)
            self._tokens += request.size
        self._news.set()

    def take(self) -> R | None:
        """The next request to run, or None while all rows are taken or nobody waits. Tenants come in turns."""
        with self._lock:
            if len(self._running) >= self.config.max_num_seqs or not self._queues:
                return None
            tenant, queue = next(iter(self._queues.items()))
            request = queue.popleft()
            if queue:
                self._queues.move_to_end(tenant)
            else:
                del self._queues[tenant]
            self._running.append(request)
            return request

    def done(self, request: R) -> None:
        """End a request that runs."""
        with self._lock:
            self._running.remove(request)
            self._tokens -= request.size

    def withdraw(self, request: R) -> bool:
        """Take a request out of its queue. Returns whether it was there; one that runs already stays."""
        with self._lock:
            queue = self._queues.get(request.tenant)
            if queue is None or request not in queue:
                return False
            queue.remove(request)
            if not queue:
                del self._queues[request.tenant]
            self._tokens -= request.size
            return True

    def wait(self, seconds: float) -> None:
        """Sleep until there is news (somebody asks, or `wake`), or for so long. News since the last call end it at once."""
        self._news.wait(seconds)
        self._news.clear()

    def wake(self) -> None:
        """End a `wait`."""
        self._news.set()
