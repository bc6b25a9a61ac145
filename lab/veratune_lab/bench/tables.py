"""Tables of the benchmarks' lines, for a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from veratune_lab.bench.peers import Peer
from veratune_lab.bench.steps import shape_of


def _name(line: dict[str, Any]) -> str:
    return Peer(line["method"], line["rank"], line["plan"], line.get("basis", "random")).name


def _new_table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def step_table(lines: list[dict[str, Any]]) -> Table:
    first = lines[0]
    shape = shape_of(first["model"])
    rows, length = first["batch"]
    table = _new_table(
        f"{shape.what}: {first['layers']} of {shape.layers} layers, {rows} x {length} tokens, {first['threads']} threads",
        (
            "",
            "s a step",
            "over frozen",
            "GFLOP beyond frozen",
            "kept for backward",
            "peak",
            "trained",
        ),
    )
    for line in lines:
        table.add_row(
            _name(line), f"{line['seconds']:.3f}", f"{line['over_frozen']:.2f}", f"{line['flops_beyond_frozen'] / 1e9:,.1f}",
            f"{line['saved_bytes'] / 2**20:,.0f} MiB", f"{line['peak_bytes'] / 2**20:,.0f} MiB", f"{line['trained']:,}",
        )  # fmt: skip
    return table


def layer_table(lines: list[dict[str, Any]]) -> Table:
    table = _new_table(
        "Forward and backward of one layer, over the frozen one",
        ("T, n -> m", "method", "plan", "over frozen"),
    )
    for line in lines:
        where = f"{line['T']}, {line['n']} -> {line['m']}"
        table.add_row(where, _name(line), line.get("chosen", ""), f"{line['over_frozen']:.2f}")
    return table


def serving_table(lines: list[dict[str, Any]]) -> Table:
    table = _new_table("Serving", ("", "measured"))
    for line in lines:
        if line["what"] == "closed load":
            table.add_row(
                line["workload"],
                f"{line['tokens_per_second']:.1f} tokens/s, {line['of_one_tenant']:.2f} of one tenant's",
            )
        elif line["what"] == "equal to alone":
            table.add_row(
                "rows of the mixed batch that are as if alone", f"{line['equal']} of {line['rows']}"
            )
        elif line["what"] == "adapters in memory":
            size = f"{line['slot_bytes'] / 2**20:,.0f} MiB, {line['process_bytes'] / 2**20:,.0f} MiB of the process"
            table.add_row(f"{line['adapters']:,} adapters in memory", size)
            table.add_row("from the store into a slot", _percentiles(line["load"]))
        elif line["what"] == "conversation":
            title = f"first token of turn {line['turns']} of a conversation, {line['last_prompt']} tokens"
            kept, again = line["first_token_kept_ms"][-1], line["first_token_read_again_ms"][-1]
            table.add_row(
                title, f"{kept:,.0f} ms; {again:,.0f} ms with nothing kept of the turns before"
            )
        elif line["what"] == "cold start":
            for kind in ("warm", "cold"):
                table.add_row(
                    f"first token, adapter {kind}", _percentiles(line[f"first_token_{kind}"])
                )
                table.add_row(
                    f"  until it has its adapter, {kind}", _percentiles(line[f"adapter_{kind}"])
                )
        else:
            title = f"open load, {line['rate']:g} requests/s of {line['distinct_tenants']} tenants"
            failed = f", {line['failed']} failed" if line["failed"] else ""
            table.add_row(title, f"{line['tokens_per_second']:.1f} tokens/s{failed}")
            table.add_row("  first token", _percentiles(line["first_token"]))
            table.add_row("  each token", _percentiles(line["each_token"]))
    return table


def _percentiles(found: dict[str, float]) -> str:
    return ", ".join(f"{name.removesuffix('_ms')} {value:,.1f} ms" for name, value in found.items())
