"""torchrun's processes of one fleet: who this one is, and where they wait for each other."""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

# Shares of tenants take different times, and the first process waits for the last.
_TIMEOUT = datetime.timedelta(days=30)


def rank_and_world() -> tuple[int, int]:
    """This process' number, and how many torchrun has started; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def processes() -> Iterator[Callable[[], None]]:
    """Join torchrun's processes, each on a GPU of its own where there are some.

    Yields:
        A function that waits until all processes have called it. Without torchrun it returns.
    """
    if rank_and_world()[1] == 1:
        yield lambda: None
        return
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local % torch.cuda.device_count())
    started_here = not dist.is_initialized()
    if started_here:
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    try:
        yield lambda: dist.barrier(group)
    finally:
        if started_here:
            dist.destroy_process_group()
