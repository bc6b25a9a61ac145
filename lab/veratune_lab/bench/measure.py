"""Time, arithmetic and memory of a training step, for contestants on the same work.

Times are taken in turns in one process, so that a machine that slows down slows all of them; ratios are of medians.
"""

import gc
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from veratune.layers.base import VeraVectors

Step = Callable[[], Any]

_LEAST = 0.01  # seconds of one measurement; shorter steps are run several times in it


def interleave(
    steps: Mapping[str, Step], seconds: float, least: int = 5, most: int = 40
) -> dict[str, list[float]]:
    """Seconds of each step, run in turns.

    seconds: time to spend in all; each step runs at least `least` and at most `most` times, after one run to warm up.
    """
    loops = {}
    for name, step in steps.items():
        step()
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        loops[name] = max(1, round(_LEAST / (time.perf_counter() - start)))
    found: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps.items())
    begin = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - begin > seconds:
            break
        first = turn % len(
            order
        )  # nobody always follows the same contestant, with what it leaves in the caches
        for name, step in order[first:] + order[:first]:
            gc.collect(0)
            start = time.perf_counter()
            for _ in range(loops[name]):
                step()
            synchronize()
            found[name].append((time.perf_counter() - start) / loops[name])
    return found


def synchronize() -> None:
    """Wait for an accelerator; nothing to do on a CPU."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def summary(times: list[float], limit: list[float]) -> dict[str, float]:
    """Median seconds and their quartiles, and the median of the ratios to the frozen limit, turn by turn."""
    low, median, high = statistics.quantiles(times, n=4)
    ratio = statistics.median(a / b for a, b in zip(times, limit, strict=True))
    return {
        "seconds": round(median, 6), "lower_quartile": round(low, 6), "upper_quartile": round(high, 6),
        "over_frozen": round(ratio, 3), "turns": len(times),
    }  # fmt: skip


def flops(step: Step) -> int:
    """Floating point operations of the step's matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def saved_bytes(forward: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward of `forward`: each storage once, weights and frozen bases apart."""
    bases = {module.basis for module in model.modules() if isinstance(module, VeraVectors)}
    held = (*model.parameters(), *model.buffers(), *(t for basis in bases for t in basis.tensors()))
    own = {t.untyped_storage().data_ptr() for t in held}
    kept: dict[int, int] = {}
    alive = []  # or an address would be given out twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return sum(kept.values())


def peak_bytes(step: Step) -> int:
    """The most memory in tensors at one time of the step, what existed before it apart."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        step()
    recorded: Any = profiler.profiler
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    return max(
        itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())),
        default=0,
    )


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, threads, versions."""
    import peft
    import transformers

    return {
        "machine": _processor(), "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__,
        "peft": peft.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
    }  # fmt: skip


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
