"""Measure this machine's speed: the figures that the choice of a plan is computed from."""

import dataclasses
import json
from pathlib import Path

import torch

from veratune.analysis.timing import median_seconds
from veratune.formats.atomic import write_atomic
from veratune.ops.calibration import CPU, Machine, calibration_file, read_calibration
from veratune.ops.plans import PLANNER

_SIDE = 1536  # of the square matrix product that measures FLOP/s


def measure(device: torch.device) -> Machine:
    """Time matrix products and writes on a device; takes about ten seconds."""

    def new(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device)

    a, b = new(_SIDE, _SIDE), new(_SIDE, _SIDE)
    flops = 2 * _SIDE**3 / median_seconds(lambda: a @ b)
    tall, thin = new(4096, 1024), new(16, 1024)
    arithmetic = 2 * 4096 * 1024 * 16 / flops
    read = 4 * tall.numel() / max(median_seconds(lambda: tall @ thin.t()) - arithmetic, 1e-7)
    small, tiny = new(1024, 1024), new(8)
    call = median_seconds(lambda: tiny * 2)
    write = 4 * small.numel() / max(median_seconds(lambda: small * 2) - call, 1e-7)
    write_large = write
    if device.type == "cpu":
        large = new(4096, 4096)
        write_large = 4 * large.numel() / median_seconds(lambda: large * 2)
    return Machine(
        flops=flops, read=read, write=write, write_large=write_large, large=CPU.large, call=call
    )


def store(device: torch.device, machine: Machine) -> Path:
    """Write a device's figures for later processes on this machine.

    Returns:
        The calibration file, which holds the figures of every kind of device that was measured.

    Raises:
        OutputError: The file cannot be written.
    """
    figures = {kind: dataclasses.asdict(found) for kind, found in read_calibration().items()}
    figures[device.type] = dataclasses.asdict(machine)
    path = calibration_file()
    write_atomic(path, (json.dumps(figures, indent=2) + "\n").encode())
    PLANNER.clear()
    return path
