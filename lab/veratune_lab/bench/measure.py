"""Time, FLOPs and memory of a training step."""

import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from veratune.analysis.timing import Step, interleave
from veratune.layers.vectors import VeraVectors


@dataclasses.dataclass(frozen=True)
class Timing:
    """How the contestants are timed.

    Args:
        seconds: Seconds of measuring, for all contestants together.
        clock: "wall", or "cpu" for this process's CPU time, where other programs run beside it.
        beside: What runs beside it, for the lines; empty for nothing.
    """

    seconds: float = 60.0
    clock: Literal["wall", "cpu"] = "wall"
    beside: str = ""

    def measure(self, steps: Mapping[str, Step]) -> dict[str, list[float]]:
        """Seconds of one run of each step, a value a turn, by name."""
        clock = time.process_time if self.clock == "cpu" else time.perf_counter
        return interleave(steps, self.seconds, clock=clock)

    def describe(self) -> dict[str, str]:
        """The clock and the company, for a line; nothing for wall time on a quiet machine."""
        about = {"clock": "CPU seconds"} if self.clock == "cpu" else {}
        return {**about, "beside": self.beside} if self.beside else about


def summary(times: list[float], frozen: list[float]) -> dict[str, float]:
    """Median and quartiles of times in seconds; `over_frozen` is the median ratio to `frozen`, turn by turn."""
    low, median, high = statistics.quantiles(times, n=4)
    ratio = statistics.median(a / b for a, b in zip(times, frozen, strict=True))
    return {
        "seconds": round(median, 6), "lower_quartile": round(low, 6), "upper_quartile": round(high, 6),
        "over_frozen": round(ratio, 3), "turns": len(times),
    }  # fmt: skip


def flops(step: Step) -> int:
    """FLOPs of the step's matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def saved_bytes(forward: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd saves for the backward pass, without weights and frozen bases."""
    bases = {module.basis for module in model.modules() if isinstance(module, VeraVectors)}
    frozen = [t for basis in bases for t in basis.tensors()]
    tensors = (*model.parameters(), *model.buffers(), *frozen)
    excluded = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    saved: dict[int, int] = {}
    alive = []  # a freed storage's address could be given out again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return sum(saved.values())


def peak_bytes(step: Step) -> int:
    """Peak bytes of the tensors that the step allocates."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        step()
    recorded: Any = profiler.profiler
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    return max(
        itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())),
        default=0,
    )
