"""Threads: the one that runs an engine's steps, and short-lived ones for other computation."""

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from veratune.serving.engine.lifecycle import EngineStats
from veratune.serving.engine.scheduler import Scheduler

log = logging.getLogger(__name__)
T = TypeVar("T")


def run_in_temporary_thread(work: Callable[[], T]) -> T:
    """Return what `work` returns, computed in a thread that ends with it.

    A thread that computes keeps its OpenMP workers as long as it lives. Where all threads together
    have more workers than there are processors, GNU's OpenMP lets them sleep between operations: an
    engine beside a main thread that loaded the model is a fifth slower. Work before the engine
    starts therefore belongs in here.
    """
    done: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)  # a daemon, so that Ctrl-C need not wait
    thread.start()
    result = done.result()
    thread.join()
    return result


class EngineThread:
    """Calls `step` in a thread until it is stopped, and sleeps while there is no work.

    Args:
        name: Name of the thread.
        step: Does one step; returns whether there was work.
        on_error: Called with the error of a step that failed unexpectedly.
        scheduler: Tells when requests arrive.
        stats: Counts steps and their time.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[], bool],
        on_error: Callable[[Exception], None],
        scheduler: Scheduler,  # type: ignore[type-arg]
        stats: EngineStats,
    ) -> None:
        self._step, self._on_error, self._scheduler = step, on_error, scheduler
        self._stats = stats
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the current step."""
        self._stop.set()
        self._scheduler.wake()
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        while not self._stop.is_set():
            begin = time.perf_counter()
            try:
                busy = self._step()
            except Exception as error:  # expected failures have ended their requests already
                log.exception("a step failed")
                busy = False
                self._on_error(error)
            if busy:
                self._stats.steps += 1
                self._stats.seconds += time.perf_counter() - begin
            else:
                self._scheduler.wait(0.5)
