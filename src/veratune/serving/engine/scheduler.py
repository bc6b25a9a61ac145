"""Scheduler: which request runs next, and which requests are too many. It handles no tensors.

Each tenant has a queue, and tenants take turns. While requests of several tenants compete, none
may hold more than its fair share of the running sequences.
"""

import collections
import dataclasses
import threading
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from veratune.errors import ConfigError, QueueFullError


class Schedulable(Protocol):
    """The part of a request that the scheduler reads: its tenant and its token limit."""

    @property
    def tenant(self) -> str: ...

    @property
    def size(self) -> int: ...


R = TypeVar("R", bound=Schedulable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Bounds of the scheduler.

    Args:
        max_num_seqs: Requests that run at once.
        max_queue: Requests that wait, over all tenants.
        max_queue_per_tenant: Requests of one tenant that wait.
        max_total_tokens: Sum of the sizes of all running and waiting requests.

    Raises:
        ConfigError: a bound is below 1.
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


_PASS_COST = 32  # tokens that cost what reading the weights for another pass costs


def select_prefill_batch(sizes: Sequence[int], max_tokens: int) -> list[int]:
    """Return which prompts of a queue one forward pass prefills, given their token counts.

    The first one is always chosen. Padded to the longest, the batch has at most `max_tokens`
    tokens, of which at most a quarter are padding, or so few that another pass costs more.

    >>> select_prefill_batch([60, 200, 64, 2, 56], 256)
    [0, 2, 4]
    """
    chosen = [0]
    for i in range(1, len(sizes)):
        batch = [sizes[k] for k in (*chosen, i)]
        area = max(batch) * len(batch)
        padding = area - sum(batch)
        if area <= max_tokens and padding <= max(0.25 * area, _PASS_COST):
            chosen.append(i)
    return chosen


class Scheduler(Generic[R]):
    """Waiting and running requests. Every method may be called from any thread."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._queues: collections.OrderedDict[str, collections.deque[R]] = collections.OrderedDict()
        self._preempted: collections.Counter[str] = collections.Counter()
        self._running: list[R] = []
        self._tokens = 0
        self._lock = threading.RLock()
        self._news = threading.Event()

    @property
    def waiting(self) -> int:
        """Number of waiting requests, preempted ones included."""
        with self._lock:
            return sum(len(queue) for queue in self._queues.values())

    @property
    def running(self) -> int:
        """Number of running requests."""
        return len(self._running)

    @property
    def tokens(self) -> int:
        """Sum of the sizes of all running and waiting requests."""
        return self._tokens

    def add(self, request: R) -> None:
        """Append a request to its tenant's queue.

        Raises:
            QueueFullError: names the bound that the request exceeds.
        """
        config, tenant = self.config, request.tenant
        with self._lock:
            queued = len(self._queues.get(tenant, ())) - self._preempted[tenant]
            if queued >= config.max_queue_per_tenant:
                raise QueueFullError(
                    f"{queued} requests of this tenant are waiting already; try again later"
                )
            if self.waiting >= config.max_queue:
                raise QueueFullError(
                    f"{self.waiting} requests are waiting already; try again later"
                )
            if self._tokens + request.size > config.max_total_tokens and self._tokens:
                raise QueueFullError(
                    f"{self._tokens} tokens are being worked on or wait already; try again later"
                )
            self._queues.setdefault(tenant, collections.deque()).append(request)
            self._tokens += request.size
        self._news.set()

    def take(self) -> R | None:
        """Move the next request to the running ones; None if all slots are taken or none waits.

        Tenants take turns; a tenant with its fair share running lets others go first.
        """
        with self._lock:
            if len(self._running) >= self.config.max_num_seqs or not self._queues:
                return None
            share, running = self._fair_share(), self._running_per_tenant()
            below = (tenant for tenant in self._queues if running[tenant] < share)
            tenant = next(below, next(iter(self._queues)))
            request = self._queues[tenant].popleft()
            if self._preempted[tenant]:  # they stand at the front of the queue
                self._preempted[tenant] -= 1
            if self._queues[tenant]:
                self._queues.move_to_end(tenant)
            else:
                del self._queues[tenant]
            self._running.append(request)
            return request

    def victim(self, candidates: Sequence[R]) -> R | None:
        """Return the running request that must make room for a tenant below its fair share.

        Args:
            candidates: Running requests that can be paused, in the order in which they started.

        Returns:
            The newest candidate of the tenant that is furthest over its share; None if no tenant
            below its share waits, or a slot is free.
        """
        with self._lock:
            if len(self._running) < self.config.max_num_seqs or not self._queues:
                return None
            share, running = self._fair_share(), self._running_per_tenant()
            if all(running[tenant] >= share for tenant in self._queues):
                return None
            over = [request for request in candidates if running[request.tenant] > share]
            if not over:
                return None
            tenant = max(over, key=lambda request: running[request.tenant]).tenant
            return next(request for request in reversed(over) if request.tenant == tenant)

    def preempt(self, request: R) -> None:
        """Move a running request back to the front of its tenant's queue."""
        with self._lock:
            self._running.remove(request)
            self._queues.setdefault(request.tenant, collections.deque()).appendleft(request)
            self._preempted[request.tenant] += 1

    def recall(self, request: R) -> None:
        """Move a preempted request to the running ones, whatever the bounds, to end it."""
        with self._lock:
            queue = self._queues[request.tenant]
            queue.remove(request)
            self._preempted[request.tenant] -= 1
            if not queue:
                del self._queues[request.tenant]
            self._running.append(request)

    def finish(self, request: R) -> None:
        """Remove a running request."""
        with self._lock:
            self._running.remove(request)
            self._tokens -= request.size

    def withdraw(self, request: R) -> bool:
        """Remove a waiting request that never ran.

        Returns:
            Whether it was waiting; running and preempted requests stay.
        """
        with self._lock:
            queue = self._queues.get(request.tenant)
            if queue is None or request not in queue:
                return False
            if queue.index(request) < self._preempted[request.tenant]:
                return False
            queue.remove(request)
            if not queue:
                del self._queues[request.tenant]
            self._tokens -= request.size
            return True

    def wait(self, seconds: float) -> None:
        """Sleep until `add` or `wake` is called, or for so long. Earlier calls end it at once."""
        self._news.wait(seconds)
        self._news.clear()

    def wake(self) -> None:
        """End a `wait`."""
        self._news.set()

    def _fair_share(self) -> int:
        tenants = {request.tenant for request in self._running} | set(self._queues)
        return max(1, self.config.max_num_seqs // max(1, len(tenants)))

    def _running_per_tenant(self) -> collections.Counter[str]:
        return collections.Counter(request.tenant for request in self._running)
