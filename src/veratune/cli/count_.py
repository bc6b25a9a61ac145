"""The command veratune count."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.table import Table

from veratune.cli.parsing import Parser, add_json, new_parser, parse, print_json, split
from veratune.config import VeraConfig


def parser() -> Parser:
    out = new_parser(
        "count",
        "Count parameters and bytes, and estimate memory, from a model configuration alone.",
    )
    out.add_argument("--config", type=str, help="YAML file of these settings; flags overrule it")
    out.add_argument(
        "--model", type=str, required=True, help="config.json, a folder that holds one, or a hub id"
    )
    out.add_argument(
        "--method",
        type=Literal["vera", "lora", "bitfit", "head", "full"],
        default="vera",
        help="fine-tuning method",
    )
    out.add_argument("--batch", type=PositiveInt, default=1, help="sequences in a training step")
    out.add_argument("--length", type=PositiveInt, default=512, help="tokens in a sequence")
    out.add_argument(
        "--base-dtype",
        type=Literal["float32", "bfloat16", "float16"],
        default="bfloat16",
        help="dtype of the base weights",
    )
    add_json(out, "the figures")
    out.add_class_arguments(VeraConfig, skip={"seed", "dtype", "head", "dropout", "d_init"})
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    from veratune.analysis.count import count

    found = count(
        flags.model,
        flags.method,
        split(flags, VeraConfig),
        batch=flags.batch,
        length=flags.length,
        dtype=flags.base_dtype,
    )
    if flags.json:
        print_json(dataclasses.asdict(found))
        return 0
    rank = f", rank {found.rank}" if found.rank else ""
    table = Table(
        title=f"{found.model}: {found.method}{rank}", title_justify="left", show_header=False
    )
    table.add_column()
    table.add_column(justify="right")
    for name, value in dataclasses.asdict(found).items():
        if isinstance(value, int) and name != "rank":
            words = name.replace("_", " ")
            table.add_row(
                words, f"{value:,}" if "bytes" not in name else f"{value:,} ({_size(value)})"
            )
    Console(highlight=False).print(table)
    return 0


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
