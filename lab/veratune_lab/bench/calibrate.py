"""What this machine does in a second: the figures that the choice of a plan rests on."""

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from veratune.formats.atomic import write_atomic
from veratune.ops.plans import CPU, Machine, calibration_file, forget, read_calibration
from veratune_lab.bench.measure import interleave

_SIDE = 1536  # of the square product that gives the rate of arithmetic


def measure(device: torch.device) -> Machine:
    """Time some products and writes on a device; about ten seconds."""

    def new(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device)

    a, b = new(_SIDE, _SIDE), new(_SIDE, _SIDE)
    rate = 2 * _SIDE**3 / _seconds(lambda: a @ b)
    tall, thin = new(4096, 1024), new(16, 1024)
    skinny = 2 * 4096 * 1024 * 16 / rate
    read = 4 * tall.numel() / max(_seconds(lambda: tall @ thin.t()) - skinny, 1e-7)
    small, tiny = new(1024, 1024), new(8)
    call = _seconds(lambda: tiny * 2)
    write = 4 * small.numel() / max(_seconds(lambda: small * 2) - call, 1e-7)
    write_large = write
    if device.type == "cpu":
        large = new(4096, 4096)
        write_large = 4 * large.numel() / _seconds(lambda: large * 2)
    return Machine(
        flops=rate, read=read, write=write, write_large=write_large, large=CPU.large, call=call
    )


def store(device: torch.device, machine: Machine) -> Path:
    """Keep a device's figures for later processes on this machine. Raises OutputError."""
    found: dict[str, Any] = {
        kind: dataclasses.asdict(figures) for kind, figures in read_calibration().items()
    }
    found[device.type] = dataclasses.asdict(machine)
    path = calibration_file()
    write_atomic(path, (json.dumps(found, indent=2) + "\n").encode())
    forget()
    return path


def _seconds(run: Callable[[], Any]) -> float:
    """The median time of a call."""
    return statistics.median(interleave({"": run}, seconds=0.0, least=15)[""])
