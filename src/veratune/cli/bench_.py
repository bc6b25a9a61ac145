"""veratune bench"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import track
from rich.table import Table

from veratune.cli.parsing import Parser, Usage, new_parser, parse, print_json
from veratune.config import PLANS, BasisKind, Plan


def parser() -> Parser:
    out = new_parser(
        "bench",
        "Time, arithmetic and memory of a training step, beside the frozen model, full fine-tuning, and PEFT's LoRA and VeRA. "
        "step: a whole model with random weights; layers: one layer in many sizes; calibrate: measure this machine, for the choice "
        "of plans.",
    )
    out.add_argument("what", type=Literal["step", "layers", "calibrate"], nargs="?", default="step", help="what to measure")
    out.add_argument("--model", type=str, default="roberta-base", help="roberta-base, vit-base, llama-1024 or smollm2-135m")
    out.add_argument("--rank", type=int | None, default=None, help="of VeRA (default: the model's own in the benchmark)")
    out.add_argument("--plan", type=Plan, default="auto", help="of veratune: the order of its products")
    out.add_argument("--basis", type=BasisKind, default="random", help="of veratune; another than random is measured beside it")
    out.add_argument("--blocks", type=int | None, default=None, help="to build (default: some, for two minutes of measuring)")
    out.add_argument("--plans", type=bool, default=False, help="layers: measure every plan, not only the one that is taken")
    out.add_argument("--seconds", type=float, default=30.0, help="of measuring times: a model, or a cell of the grid")
    out.add_argument("--threads", type=int, default=2, help="that compute")
    out.add_argument(
        "--explain", type=bool, default=False, help="show what each plan would cost by the cost model; measure nothing"
    )
    out.add_argument("--out", type=str | None, default=None, help="add the lines to this file as JSON lines")
    out.add_argument("--json", type=bool, default=False, help="print the figures as JSON")
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    if flags.threads < 1 or flags.seconds < 0 or any(v is not None and v < 1 for v in (flags.rank, flags.blocks)):
        raise Usage("--threads, --rank and --blocks start at 1, --seconds at 0")
    import torch

    torch.set_num_threads(flags.threads)
    console = Console(stderr=flags.json, highlight=False)
    if flags.explain:
        from veratune.bench.explain import explain

        lines = explain(flags.model, flags.rank)
        console.print(_plans(lines))
    elif flags.what == "calibrate":
        from veratune.bench.calibrate import measure, store

        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = device or torch.device("cpu")
        figures = measure(device)
        lines = [{"device": device.type, **dataclasses.asdict(figures), "file": str(store(device, figures))}]
        console.print(_figures(lines[0]))
    elif flags.what == "layers":
        from veratune.bench.layers import ROWS, SIZES, grid

        cells = [(T, size) for T in ROWS for size in SIZES]
        lines = []
        for T, size in track(cells, description="layers", console=console, disable=flags.json):
            found = list(grid([T], [size], plans=flags.plans, seconds=flags.seconds))
            _append(flags.out, found)
            lines += found
        console.print(_layers(lines))
    else:
        from veratune.bench.peers import OTHERS, OURS, Peer
        from veratune.bench.steps import shape_of, step

        shape = shape_of(flags.model)
        rank, layers = flags.rank or shape.rank, flags.blocks or shape.quick
        peers = [*OTHERS, Peer("peft-vera", rank), Peer(OURS, rank, flags.plan)]
        if flags.basis != "random":
            peers.append(Peer(OURS, rank, flags.plan, flags.basis))
        with console.status(flags.model) as status:
            lines = step(flags.model, rank=rank, layers=layers, peers=peers, seconds=flags.seconds, told=status.update)
        _append(flags.out, lines)
        console.print(_steps(lines, shape.what, shape.layers))
    if flags.json:
        print_json(lines)
    return 0


def _append(path: str | None, lines: list[dict[str, Any]]) -> None:
    if path is not None:
        with Path(path).open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def _name(line: dict[str, Any]) -> str:
    from veratune.bench.peers import Peer

    return Peer(line["method"], line["rank"], line["plan"], line.get("basis", "random")).name


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _steps(lines: list[dict[str, Any]], what: str, layers: int) -> Table:
    first = lines[0]
    rows, length = first["batch"]
    table = _table(
        f"{what}: {first['layers']} of {layers} layers, {rows} x {length} tokens, {first['threads']} threads",
        ("", "s a step", "over frozen", "GFLOP beyond frozen", "kept for backward", "peak", "trained"),
    )
    for line in lines:
        table.add_row(
            _name(line), f"{line['seconds']:.3f}", f"{line['over_frozen']:.2f}", f"{line['flops_beyond_frozen'] / 1e9:,.1f}",
            f"{line['saved_bytes'] / 2**20:,.0f} MiB", f"{line['peak_bytes'] / 2**20:,.0f} MiB", f"{line['trained']:,}",
        )  # fmt: skip
    return table


def _layers(lines: list[dict[str, Any]]) -> Table:
    table = _table("Forward and backward of one layer, over the frozen one", ("T, n -> m", "method", "plan", "over frozen"))
    for line in lines:
        where = f"{line['T']}, {line['n']} -> {line['m']}"
        table.add_row(where, _name(line), line.get("chosen", ""), f"{line['over_frozen']:.2f}")
    return table


def _plans(lines: list[dict[str, Any]]) -> Table:
    table = _table("Estimated milliseconds beyond the frozen layer", ("T, n -> m, rank", "frozen", *PLANS, "taken"))
    for line in lines:
        costs = (f"{1e3 * line['seconds'][plan]:.1f}" for plan in PLANS)
        kept = "" if line["plan"] == "factored" else ", W + ΔW kept" if line["keep"] else ", W + ΔW made twice"
        table.add_row(
            f"{line['T']}, {line['n']} -> {line['m']}, {line['rank']}\n({', '.join(line['layers'])})", f"{1e3 * line['frozen']:.1f}",
            *costs, line["plan"] + kept,
        )  # fmt: skip
    return table


def _figures(line: dict[str, Any]) -> Table:
    table = _table(f"This machine's {line['device']}, stored in {line['file']}", ("", "measured"))
    for name, unit, scale in (
        ("flops", "GFLOP/s", 1e-9), ("read", "GB/s read by a product", 1e-9), ("write", "GB/s written", 1e-9),
        ("write_large", "GB/s written over 32 MB", 1e-9), ("call", "microseconds a call", 1e6),
    ):  # fmt: skip
        table.add_row(unit, f"{line[name] * scale:.1f}")
    return table
