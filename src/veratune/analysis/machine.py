"""Describe the machine and the versions that a measured figure depends on."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

# Other programs that figures are compared with.
PACKAGES = ("peft", "transformers")


def describe_machine() -> dict[str, str | int | None]:
    """Processor or GPU, threads, cores and versions: written beside every measured figure.

    A package that is not installed has no entry.
    """
    about: dict[str, str | int | None] = {
        "machine": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    for package in PACKAGES:
        try:
            about[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return about | {"python": platform.python_version()}


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
