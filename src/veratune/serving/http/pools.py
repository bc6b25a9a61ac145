"""ThreadPools: where routes run blocking work, apart from each other and from the event loop."""

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from veratune.errors import QueueFullError

P = ParamSpec("P")
T = TypeVar("T")


class BoundedPool:
    """Threads with a bounded queue."""

    def __init__(self, name: str, threads: int, max_queue: int) -> None:
        """Start no thread yet.

        Args:
            name: Of the threads.
            threads: The most threads.
            max_queue: Calls that may run or wait; more raise QueueFullError.
        """
        self.name, self.max_queue = name, max_queue
        self._pending = 0  # counted in the event loop only
        self._executor = concurrent.futures.ThreadPoolExecutor(threads, f"veratune-{name}")

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `work` in a thread. Raises what it raises, or QueueFullError."""
        if self._pending >= self.max_queue:
            raise QueueFullError(
                f"{self._pending} {self.name} calls are waiting already; try again later"
            )
        future = self._executor.submit(work, *args, **kwargs)
        self._pending += 1
        loop = asyncio.get_running_loop()
        try:
            return await asyncio.wrap_future(future)
        finally:
            # A call whose client has gone still occupies its thread.
            if future.done():
                self._pending -= 1
            else:
                future.add_done_callback(lambda _: self._finish(loop))

    def close(self) -> None:
        """Take no more calls; those that wait are dropped."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _finish(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            loop.call_soon_threadsafe(self._decrement)
        except RuntimeError:  # the event loop has ended with its server
            self._decrement()

    def _decrement(self) -> None:
        self._pending -= 1


class ThreadPools:
    """A pool for each kind of blocking work, so that one that is stuck starves no other."""

    def __init__(self) -> None:
        self.read = BoundedPool("read", threads=8, max_queue=512)
        self.write = BoundedPool("write", threads=4, max_queue=32)
        self.route = BoundedPool("route", threads=8, max_queue=512)
        self.examples = BoundedPool("examples", threads=2, max_queue=16)
        self.tokenize = BoundedPool("tokenize", threads=2, max_queue=512)
        self.grammar = BoundedPool("grammar", threads=2, max_queue=64)
        self.batch = BoundedPool("batch", threads=2, max_queue=4096)
        self.health = BoundedPool("health", threads=1, max_queue=4)

    def close(self) -> None:
        """Stop all of them."""
        for pool in vars(self).values():
            pool.close()
