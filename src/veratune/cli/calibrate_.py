"""The command veratune calibrate."""

import dataclasses
from collections.abc import Sequence

from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.table import Table

from veratune.cli.parsing import Parser, add_json, new_parser, parse, print_json

# Field, unit, and the factor from the field to the unit.
_SHOWN = (
    ("flops", "GFLOP/s of a matrix product", 1e-9),
    ("read", "GB/s read by a product", 1e-9),
    ("write", "GB/s written", 1e-9),
    ("write_large", "GB/s written, results over 32 MB", 1e-9),
    ("call", "microseconds for any call", 1e6),
)


def parser() -> Parser:
    out = new_parser(
        "calibrate",
        "Measure this machine for ten seconds and store the figures, which plan=auto uses from "
        "then on.",
    )
    out.add_argument("--threads", type=PositiveInt | None, default=None, help="threads for torch")
    add_json(out, "the figures")
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    import torch

    from veratune.analysis.calibrate import measure, store

    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    machine = measure(device)
    path = store(device, machine)
    if flags.json:
        print_json({"device": device.type, **dataclasses.asdict(machine), "file": str(path)})
        return 0
    table = Table("", f"this machine's {device.type}", caption=str(path))
    for field, unit, factor in _SHOWN:
        table.add_row(unit, f"{getattr(machine, field) * factor:,.1f}")
    Console(highlight=False).print(table)
    return 0
