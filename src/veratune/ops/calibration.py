"""Speed of this machine's devices, as measured by `veratune calibrate` or built in."""

import dataclasses
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from veratune.errors import DataError


@dataclasses.dataclass(frozen=True)
class Machine:
    """Speed of a device, as far as the cost of a plan depends on it.

    Args:
        flops: Floating-point operations of a large matrix product, per second.
        read: Bytes that a product streams through, per second.
        write: Bytes of new memory that one operation writes, per second.
        write_large: The same for results over `large` bytes (glibc maps and clears those anew).
        large: Size in bytes from which `write_large` holds.
        call: Seconds of one operation, whatever its size.
    """

    flops: float
    read: float
    write: float
    write_large: float
    large: float
    call: float


# Timed on two cores of an AMD EPYC. Those of an accelerator are round figures, not measured.
CPU = Machine(flops=1.9e11, read=6e10, write=2.5e10, write_large=3e9, large=3.2e7, call=4e-6)
ACCELERATOR = Machine(
    flops=6e13, read=2e12, write=2e12, write_large=2e12, large=float("inf"), call=6e-6
)


def calibration_file() -> Path:
    """Path of this machine's calibration: in $VERATUNE_CACHE, or veratune in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(os.environ.get("VERATUNE_CACHE") or os.path.join(cache, "veratune"))
    return folder / f"machine-{platform.node() or 'here'}.json"


def read_calibration() -> dict[str, Machine]:
    """Read the stored figures by kind of device ("cpu", "cuda"); empty without a file.

    Raises:
        DataError: names the file when it holds anything else.
    """
    path = calibration_file()
    try:
        stored = json.loads(path.read_text())
        return {kind: _machine(figures) for kind, figures in stored.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: no calibration of a machine ({error}); delete it or run veratune calibrate"
        ) from None


def _machine(figures: Mapping[str, float]) -> Machine:
    machine = Machine(**{name: float(value) for name, value in figures.items()})
    if not all(value > 0 for value in dataclasses.astuple(machine)):
        raise ValueError("figures must be above 0")
    return machine
