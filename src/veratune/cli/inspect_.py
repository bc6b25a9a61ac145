"""The command veratune inspect."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from veratune.cli.parsing import Parser, new_parser, parse, print_json


def parser() -> Parser:
    out = new_parser("inspect", "Check an adapter's file and show what is in it.")
    out.add_argument("file", type=str, help="adapter file")
    out.add_argument(
        "--plot",
        type=str | None,
        default=None,
        help="draw |d| and |b| by block into this image file (png, svg, pdf)",
    )
    out.add_argument(
        "--json", type=bool, default=False, help="print the figures as one JSON object"
    )
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    from veratune.analysis.inspect import plot, summary
    from veratune.formats import native

    adapter = native.read(flags.file)
    if flags.plot is not None:
        plot(adapter, flags.plot)
    found = summary(adapter)
    if flags.json:
        print_json(found)
        return 0
    console = Console(highlight=False)
    table = Table(title=flags.file, title_justify="left")
    for name, side in (
        ("layer", "left"),
        ("size", "right"),
        ("rank", "right"),
        ("|d|", "right"),
        ("|b|", "right"),
    ):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for entry in found["layers"]:
        norms = (f"{v:.4f}" if v is not None else "-" for v in (entry["d_norm"], entry["b_norm"]))
        table.add_row(
            entry["layer"],
            f"{entry['in_features']} -> {entry['out_features']}",
            str(entry["rank"]),
            *norms,
        )
    console.print(table)
    console.print(
        f"{found['trainable']:,} values in d and b, {found['head']:,} in the head; base model {found['base']!r}"
    )
    shown = {k: v for k, v in found["config"].items() if v not in (None, [], {})}
    console.print(", ".join(f"{k} {v}" for k, v in shown.items()))
    if found["task"]:
        console.print(f"task: {found['task']}")
    if flags.plot is not None:
        console.print(f"drawn: {flags.plot}")
    return 0
