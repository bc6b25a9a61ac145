"""Time several functions in turns, so that a machine that slows down slows all of them alike."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Step = Callable[[], object]

# A function shorter than this is run several times for one measurement.
_SHORTEST_SECONDS = 0.01


def interleave(
    steps: Mapping[str, Step],
    seconds: float,
    least: int = 5,
    most: int = 40,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time each step, in turns.

    Args:
        steps: The functions to time, by name. Each runs at least twice before, to warm up.
        seconds: Time to spend on all of them together.
        least: Measurements of each step at least, whatever the time.
        most: Measurements of each step at most.
        clock: Reads the time in seconds; `time.process_time` counts CPU time, on a busy machine.

    Returns:
        Seconds of one run, a value a turn, by name.
    """
    repeats = {name: _repeats(step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps.items())
    begin = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - begin > seconds:
            break
        first = turn % len(order)  # no step always runs on the caches of the same other one
        for name, step in order[first:] + order[:first]:
            gc.collect(0)
            start = clock()
            for _ in range(repeats[name]):
                step()
            synchronize()
            times[name].append((clock() - start) / repeats[name])
    return times


def median_seconds(step: Step, runs: int = 15) -> float:
    """The median time of one function."""
    return statistics.median(interleave({"": step}, seconds=0.0, least=runs)[""])


def synchronize() -> None:
    """Wait for an accelerator. Does nothing on a CPU."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _repeats(step: Step) -> int:
    """How often a step runs for one measurement."""
    step()
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return max(1, round(_SHORTEST_SECONDS / (time.perf_counter() - start)))
