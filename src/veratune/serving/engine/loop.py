"""Loop: what the engine of a causal model and that of an encoder have in common. Requests come and go from any thread; one thread works.

    Loop (abstract)
    ├── Engine     generates with a causal model
    └── Encoder    reads with an encoder: embeddings and classes

Adapters that are not in memory are fetched beside the steps, so that a slow store holds up only those who wait for it.
"""

import abc
import collections
import concurrent.futures
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from veratune.adapter import Adapter
from veratune.errors import (
    ConfigError,
    PoolFullError,
    ShutdownError,
    UnsupportedError,
    VeratuneError,
)
from veratune.serving.engine.scheduler import Scheduler, SchedulerConfig
from veratune.serving.pool.pool import AdapterPool, Key, Lease

log = logging.getLogger(__name__)
FETCHERS = 8  # threads that wait for the store


T = TypeVar("T")


def run_in_temporary_thread(work: Callable[[], T]) -> T:
    """What `work` returns, from a thread that ends with it. What a server computes before its loops do belongs in here.

    Each thread that computes keeps helpers of its own as long as it lives, and where there are more of them than processors, GNU's OpenMP lets
    all of them sleep between two operations: a loop beside a main thread that has loaded the model is a fifth slower.
    """
    done: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)  # a daemon, that Ctrl-C need not wait for it
    thread.start()
    result = done.result()
    thread.join()
    return result


@dataclasses.dataclass(eq=False)
class BaseRequest(abc.ABC):
    """What is asked of a loop. What it answers, and in the end an error if there is one, goes to `listen`.

    tenant: whose turn it takes; key, load: of the adapter, as in `AdapterPool.acquire`; times: of arrival, of having the adapter, of the first answer and the end,
    in seconds of time.perf_counter.
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
        self.outputs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.on_output: Callable[[Any], None] = self.outputs.put
        self.lease: Lease | None = None

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """The most tokens it may take."""


R = TypeVar("R", bound=BaseRequest)


@dataclasses.dataclass
class EngineStats:
    """What a loop did: steps, tokens of prompts that were read and that were known already, tokens of answers, seconds in steps, requests
    that ended, by how.
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    seconds: float = 0.0
    finished: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


class Loop(abc.ABC, Generic[R]):
    """One model with a pool of adapters, and the requests for it. `start` works in a thread of its own; `step` is one step of the work."""

    def __init__(
        self, model: Any, tokenizer: Any, pool: AdapterPool, config: SchedulerConfig | None
    ) -> None:
        self.model, self.tokenizer, self.pool = model.eval(), tokenizer, pool
        self.config = config or SchedulerConfig()
        if pool.slots < self.config.max_num_seqs:
            raise ConfigError(
                f"the pool has {pool.slots} slots for {self.config.max_num_seqs} rows; every row may want one of its own"
            )
        self.scheduler: Scheduler[R] = Scheduler(self.config)
        self.stats = EngineStats()
        self._device = next(model.parameters()).device
        self._fetching: list[tuple[R, concurrent.futures.Future[Adapter] | None]] = []
        self._fetchers = concurrent.futures.ThreadPoolExecutor(FETCHERS, "veratune-fetch")
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._drain = False

    @abc.abstractmethod
    def step(self) -> bool:
        """One step. Returns whether there was anything to do."""

    @abc.abstractmethod
    def check(self, request: R) -> None:
        """Raise ConfigError for a request that cannot be met."""

    def submit(self, request: R) -> R:
        """BaseRequest. Returns the request, whose answers come as they are made.

        Raises ConfigError for one that is empty or does not fit, QueueFullError where too much waits, ShutdownError after `close`.
        """
        self.check(request)
        if self._drain:
            raise ShutdownError("the server is going down and takes no more requests")
        self.scheduler.add(request)
        return request

    def cancel(self, request: R) -> None:
        """End a request: at once if it waits, at the next step if it runs."""
        request.cancelled.set()
        if self.scheduler.withdraw(request):
            request.finished_time = time.perf_counter()
            self.stats.finished["cancelled"] += 1
            self.report_cancelled(request)
        self.scheduler.wake()

    def report_cancelled(self, request: R) -> None:
        """Tell who asked that the request was cancelled."""
        request.on_output(ShutdownError("the request was cancelled"))

    def start(self) -> None:
        """Work in a thread until `close`."""
        self._thread = threading.Thread(
            target=self._work, name=f"veratune-{type(self).__name__.lower()}", daemon=True
        )
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread works and takes requests."""
        return self._thread is not None and self._thread.is_alive() and not self._drain

    def close(self, drain: float = 0.0) -> None:
        """Take no more requests, give those there are `drain` seconds to end, and stop."""
        self._drain = True
        end = time.monotonic() + drain
        while time.monotonic() < end and (self.scheduler.waiting or self.scheduler.running):
            time.sleep(0.01)
        self._stop.set()
        self.scheduler.wake()
        if self._thread is not None:
            self._thread.join()
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        down = ShutdownError("the server went down before the answer was whole")
        for request in [*self.rows(), *(request for request, _ in self._fetching)]:
            self.fail(request, down)
        self._fetching = []
        while (waiting := self.scheduler.take()) is not None:
            self.fail(waiting, down)

    def rows(self) -> list[R]:
        """The requests that are being answered."""
        return []

    def forget(self, key: Key) -> None:
        """Take an adapter out of memory, if nobody uses it now."""
        self.pool.drop(key)

    @property
    def prefix_cache_bytes(self) -> int:
        """Bytes of what is kept of prompts that were read."""
        return 0

    def next(self) -> R | None:
        """The next request to answer, with the lease of its adapter; None if nobody waits whose adapter is in memory."""
        # No more than can be fetched at once: who is in here has had its turn, and others of its tenant would come before those who ask later.
        while len(self._fetching) < FETCHERS and (request := self.scheduler.take()) is not None:
            self._fetching.append((request, self._fetch(request)))
        for entry in list(self._fetching):
            request, fetched = entry
            if request.cancelled.is_set():
                self._fetching.remove(entry)
                self.finish(request, "cancelled")
                self.report_cancelled(request)
            elif fetched is None or fetched.done():
                self._fetching.remove(entry)
                try:
                    request.lease = self.pool.acquire(
                        request.key, request.load if fetched is None else fetched.result
                    )
                except Exception as error:
                    # A full pool is as much a failure of this one request as a file that cannot be read.
                    self.finish(request, "busy" if isinstance(error, PoolFullError) else "error")
                    request.on_output(error)
                else:
                    request.adapter_ready_time = time.perf_counter()
                    return request
        return None

    def finish(self, request: R, how: str) -> None:
        """Note the end of a request that ran, and give back what it held."""
        request.finished_time = time.perf_counter()
        self.stats.finished[how] += 1
        if request.lease is not None:
            request.lease.release()
        self.scheduler.done(request)

    def fail(self, request: R, error: Exception) -> None:
        """End a request that ran with an error."""
        self.finish(request, "error")
        request.on_output(error)

    def fail_batch(self, rows: Sequence[R], error: Exception) -> None:
        """End the requests of a pass that failed."""
        log.error("a pass of %d rows failed", len(rows), exc_info=error)
        for request in rows:
            self.fail(
                request,
                error
                if isinstance(error, VeratuneError)
                else RuntimeError(f"the model failed: {error}"),
            )

    def drop_nonfinite(self, rows: Sequence[R], made: Tensor) -> tuple[list[R], Tensor]:
        """The rows for which a pass made finite numbers, and those, (rows, numbers); the others have failed."""
        fine = torch.isfinite(
            made.amax(-1) - made.amin(-1)
        )  # a NaN is both, an infinity one of them
        found: list[R] = []
        for request, good in zip(rows, fine.tolist(), strict=True):
            if good:
                found.append(request)
            else:
                self.fail(
                    request,
                    UnsupportedError("the adapter makes the model's output infinite or NaN"),
                )
        return found, made if len(found) == len(rows) else made[fine]

    def _fetch(self, request: R) -> "concurrent.futures.Future[Adapter] | None":
        if request.key is None or request.key in self.pool or request.load is None:
            return None
        fetched = self._fetchers.submit(request.load)
        fetched.add_done_callback(lambda _: self.scheduler.wake())
        return fetched

    def _work(self) -> None:
        while not self._stop.is_set():
            begin = time.perf_counter()
            try:
                busy = self.step()
            except (
                Exception
            ) as error:  # a step's own failures have ended their requests; this is a mistake here
                log.exception("a step failed")
                busy = False
                for request in self.rows():
                    self.fail(request, error)
            if busy:
                self.stats.steps += 1
                self.stats.seconds += time.perf_counter() - begin
            else:
                self.scheduler.wait(0.5)
