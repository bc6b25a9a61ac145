"""The command veratune inspect."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from veratune.cli.parsing import Parser, add_json, new_parser, parse, print_json


def parser() -> Parser:
    out = new_parser("inspect", "Verify an adapter file and show its layers, norms and settings.")
    out.add_argument("file", type=str, help="adapter file")
    out.add_argument(
        "--plot",
        type=str | None,
        default=None,
        help="write a plot of |d| and |b| by block to this file (png, svg, pdf)",
    )
    add_json(out, "the figures")
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    from veratune.analysis.inspect import plot, summary
    from veratune.formats import native

    adapter = native.read(flags.file)
    if flags.plot is not None:
        plot(adapter, flags.plot)
    figures = summary(adapter)
    if flags.json:
        print_json(figures)
        return 0
    console = Console(highlight=False)
    table = Table(title=flags.file, title_justify="left")
    table.add_column("layer")
    for name in ("size", "rank", "|d|", "|b|"):
        table.add_column(name, justify="right")
    for entry in figures["layers"]:
        norms = (f"{v:.4f}" if v is not None else "-" for v in (entry["d_norm"], entry["b_norm"]))
        table.add_row(
            entry["layer"],
            f"{entry['in_features']} -> {entry['out_features']}",
            str(entry["rank"]),
            *norms,
        )
    console.print(table)
    counts = f"{figures['trainable']:,} values in d and b, {figures['head']:,} in the head"
    console.print(f"{counts}; base model {figures['base']!r}")
    shown = {k: v for k, v in figures["config"].items() if v not in (None, [], {})}
    console.print(", ".join(f"{k} {v}" for k, v in shown.items()))
    if figures["task"]:
        console.print(f"task: {figures['task']}")
    if flags.plot is not None:
        console.print(f"plot: {flags.plot}")
    return 0
