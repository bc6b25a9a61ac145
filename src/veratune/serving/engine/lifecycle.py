"""The life of requests in an engine: admission, preparation beside the steps, and their end.

Adapters that are not in memory are read, and grammars are compiled, in threads of their own: a slow
store holds up only the requests that wait for it.
"""

import collections
import concurrent.futures
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

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
from veratune.serving.engine.requests import BaseRequest
from veratune.serving.engine.scheduler import Scheduler, SchedulerConfig
from veratune.serving.pool.pool import AdapterPool

log = logging.getLogger(__name__)
MAX_PREPARING = 8  # requests whose adapter or grammar is being prepared at once
R = TypeVar("R", bound="BaseRequest")  # type: ignore[type-arg]


@dataclasses.dataclass
class EngineStats:
    """Counts of an engine since its start.

    Args:
        steps: Steps with work.
        prompt_tokens: Prompt tokens that were computed.
        cached_tokens: Prompt tokens that the prefix cache had.
        generation_tokens: Tokens that were sampled.
        preemptions: Times that a sequence was paused for another tenant.
        seconds: Time in steps.
        finished: Requests that ended, by how: stop, length, cancelled, error, busy.
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    seconds: float = 0.0
    finished: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


class RequestLifecycle(Generic[R]):
    """Takes requests from any thread and gives prepared ones to the engine's thread.

    Args:
        pool: Leases adapters.
        config: Bounds on running and waiting requests.
        discard: Frees what the engine holds for a request that runs; called before its end.

    Raises:
        ConfigError: the pool has fewer slots than requests may run.
    """

    def __init__(
        self, pool: AdapterPool, config: SchedulerConfig, discard: Callable[[R], None]
    ) -> None:
        if pool.slots < config.max_num_seqs:
            raise ConfigError(
                f"the pool has {pool.slots} slots and max_num_seqs is {config.max_num_seqs}; "
                "every sequence may need its own slot, so at least as many are wanted"
            )
        self.pool, self.stats = pool, EngineStats()
        self.scheduler: Scheduler[R] = Scheduler(config)
        self.closing = False
        self._discard = discard
        self._preparing: list[tuple[R, concurrent.futures.Future[Adapter | None] | None]] = []
        self._executor = concurrent.futures.ThreadPoolExecutor(MAX_PREPARING, "veratune-prepare")

    def submit(self, request: R) -> R:
        """Queue a request.

        Raises:
            QueueFullError: too much is waiting.
            ShutdownError: the engine is closing.
        """
        if self.closing:
            raise ShutdownError("the server is going down and takes no more requests")
        self.scheduler.add(request)
        return request

    def cancel(self, request: R) -> None:
        """End a request: at once if it waits, at the next step if it runs."""
        request.cancelled.set()
        if self.scheduler.withdraw(request):
            request.finished_time = time.perf_counter()
            self.stats.finished["cancelled"] += 1
            request.report_cancelled()
        self.scheduler.wake()

    def next_ready(self) -> R | None:
        """Return the next request to run, with its adapter leased; None if there is none."""
        # No more than can be prepared at once: a request in here has used its tenant's turn.
        while len(self._preparing) < MAX_PREPARING:
            request = self.scheduler.take()
            if request is None:
                break
            if request.lease is not None:  # it was preempted, and is ready
                return request
            self._preparing.append((request, self._prepare(request)))
        for entry in list(self._preparing):
            request, prepared = entry
            if request.cancelled.is_set():
                self._preparing.remove(entry)
                self.end(request, "cancelled")
                request.report_cancelled()
            elif prepared is None or prepared.done():
                self._preparing.remove(entry)
                if self._lease(request, prepared):
                    return request
        return None

    def end(self, request: R, reason: str) -> None:
        """Count the end of a request that ran, and give back its adapter."""
        self._discard(request)
        request.finished_time = time.perf_counter()
        self.stats.finished[reason] += 1
        if request.lease is not None:
            request.lease.release()
        self.scheduler.finish(request)

    def fail(self, request: R, error: BaseException) -> None:
        """End a request that ran with an error."""
        self.end(request, "error")
        request.on_output(error)

    def fail_batch(self, requests: Sequence[R], error: Exception) -> None:
        """End the requests of a forward pass that failed."""
        log.error("a forward pass of %d sequences failed", len(requests), exc_info=error)
        known = isinstance(error, VeratuneError)
        for request in requests:
            self.fail(request, error if known else RuntimeError(f"the model failed: {error}"))

    def drop_nonfinite(self, requests: Sequence[R], output: Tensor) -> tuple[list[R], Tensor]:
        """Fail the requests whose output has an infinity or a NaN.

        Args:
            requests: One a row of `output`.
            output: Shape (rows, width).

        Returns:
            The other requests and their rows.
        """
        # A NaN makes both of these NaN, an infinity one of them infinite.
        finite = torch.isfinite(output.amax(-1) - output.amin(-1))
        kept: list[R] = []
        for request, good in zip(requests, finite.tolist(), strict=True):
            if good:
                kept.append(request)
            else:
                self.fail(
                    request,
                    UnsupportedError("the adapter makes the model's output infinite or NaN"),
                )
        return kept, output if len(kept) == len(requests) else output[finite]

    def close(self, running: Sequence[R]) -> None:
        """End every request, those in `running` too. Call after the engine's thread has ended."""
        self.closing = True
        self._executor.shutdown(wait=False, cancel_futures=True)
        error = ShutdownError("the server went down before the answer was whole")
        for request in [*running, *(request for request, _ in self._preparing)]:
            self.fail(request, error)
        self._preparing = []
        while (waiting := self.scheduler.take()) is not None:
            self.fail(waiting, error)

    def _prepare(self, request: R) -> "concurrent.futures.Future[Adapter | None] | None":
        load = request.load
        if request.key is None or request.key in self.pool:
            load = None
        if load is None and not request.needs_preparation:
            return None

        def work() -> Adapter | None:
            request.prepare()
            return self.pool.prepare(load()) if load is not None else None

        prepared = self._executor.submit(work)
        prepared.add_done_callback(lambda _: self.scheduler.wake())
        return prepared

    def _lease(
        self, request: R, prepared: "concurrent.futures.Future[Adapter | None] | None"
    ) -> bool:
        """Lease the request's adapter; end the request and return False if that fails."""
        try:
            adapter = prepared.result() if prepared is not None else None
            load = request.load if adapter is None else lambda: adapter
            request.lease = self.pool.acquire(request.key, load)
        except Exception as error:
            # A full pool is a failure of this one request, as a file that cannot be read is.
            self.end(request, "busy" if isinstance(error, PoolFullError) else "error")
            request.on_output(error)
            return False
        request.adapter_ready_time = time.perf_counter()
        return True
