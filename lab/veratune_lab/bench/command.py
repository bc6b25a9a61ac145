"""veratune bench"""

import asyncio
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from veratune.cli.parsing import Parser, UsageError, new_parser, parse, print_json, split
from veratune.config import PLANS, BasisKind, Plan, VeraConfig
from veratune.errors import near
from veratune_lab.bench.load import Load, OpenLoad

FORMS = {
    "step": "a training step of a whole model with random weights, beside the frozen model, full fine-tuning, and PEFT's LoRA and VeRA",
    "layers": "one layer in many sizes, beside the same",
    "calibrate": "measure this machine, for the choice of plans",
    "explain": "what each plan would cost by the cost model; nothing is measured",
    "serve": "many tenants on one engine, beside one tenant, the base alone and PEFT's mixed batches",
    "load": "random load on a server that runs and speaks OpenAI's API; its models are the tenants",
}


def parser(form: str = "step") -> Parser:
    """The flags of one of the forms."""
    out = new_parser(f"bench {form}", f"{FORMS[form][0].upper()}{FORMS[form][1:]}.")
    if form in ("step", "explain"):
        out.add_argument(
            "--model",
            type=str,
            default="roberta-base",
            help="roberta-base, vit-base, llama-1024 or smollm2-135m",
        )
        out.add_argument(
            "--rank",
            type=PositiveInt | None,
            default=None,
            help="of VeRA (default: the model's own in the benchmark)",
        )
    if form == "step":
        out.add_argument(
            "--plan", type=Plan, default="auto", help="of veratune: the order of its products"
        )
        out.add_argument(
            "--basis",
            type=BasisKind,
            default="random",
            help="of veratune; another than random is measured beside it",
        )
        out.add_argument(
            "--blocks",
            type=PositiveInt | None,
            default=None,
            help="to build (default: some, for two minutes of measuring)",
        )
    if form == "layers":
        out.add_argument(
            "--plans",
            type=bool,
            default=False,
            help="measure every plan, not only the one that is taken",
        )
    if form in ("step", "layers"):
        out.add_argument(
            "--seconds",
            type=NonNegativeFloat,
            default=30.0,
            help="of measuring times: a model, or a cell of the grid",
        )
    if form == "serve":
        out.add_argument(
            "--model",
            type=str,
            required=True,
            help="causal base model: folder, .gguf file or Hugging Face id",
        )
        out.add_argument("--rank", type=PositiveInt, default=256, help="of the adapters")
        out.add_argument(
            "--targets", type=list[str], default=["query", "value"], help="layers that they adapt"
        )
        out.add_argument(
            "--base-dtype",
            type=Literal["float32", "bfloat16", "float16"],
            default="float32",
            help="of the base model",
        )
        out.add_class_arguments(Load)
    if form == "load":
        out.add_argument("--url", type=str, required=True, help="of the server, without /v1")
        out.add_argument(
            "--key",
            type=str | None,
            default=None,
            help="the environment variable that holds its key",
        )
        out.add_class_arguments(OpenLoad)
    if form != "explain":
        out.add_argument(
            "--out", type=str | None, default=None, help="add the lines to this file as JSON lines"
        )
    if form not in ("explain", "load"):
        out.add_argument("--threads", type=PositiveInt, default=2, help="that compute")
    out.add_argument("--json", type=bool, default=False, help="print the figures as JSON")
    return out


def run(argv: Sequence[str]) -> int:
    words = list(argv)
    form = words.pop(0) if words and not words[0].startswith("-") else "step"
    if form not in FORMS:
        raise UsageError(f"no benchmark {form!r}; there are {', '.join(FORMS)}{near(form, FORMS)}")
    flags = parse(parser(form), words)
    if any(
        getattr(flags, name, None) is not None and getattr(flags, name) < 1
        for name in ("threads", "rank", "blocks")
    ):
        raise UsageError("--threads, --rank and --blocks start at 1")
    if getattr(flags, "seconds", 0.0) < 0:
        raise UsageError("--seconds starts at 0")
    if "threads" in flags:
        import torch

        torch.set_num_threads(flags.threads)
    console = Console(stderr=flags.json, highlight=False)
    measure, show = _RUN[form]
    lines = measure(flags, console)
    if form != "layers" and getattr(flags, "out", None):
        _append(flags.out, lines)
    console.print(show(lines))
    if flags.json:
        print_json(lines)
    return 0


def _explain(flags: Namespace, console: Console) -> list[dict[str, Any]]:
    from veratune_lab.bench.explain import explain

    return explain(flags.model, flags.rank)


def _calibrate(flags: Namespace, console: Console) -> list[dict[str, Any]]:
    import torch

    from veratune_lab.bench.calibrate import measure, store

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    figures = measure(device)
    lines = [
        {"device": device.type, **dataclasses.asdict(figures), "file": str(store(device, figures))}
    ]
    return lines


def _grid(flags: Namespace, console: Console) -> list[dict[str, Any]]:
    from veratune_lab.bench.layers import ROWS, SIZES, grid

    cells = [(T, size) for T in ROWS for size in SIZES]
    lines: list[dict[str, Any]] = []
    for T, size in track(cells, description="layers", console=console, disable=flags.json):
        found = list(grid([T], [size], plans=flags.plans, seconds=flags.seconds))
        _append(flags.out, found)  # a cell at a time: this takes long
        lines += found
    return lines


def _model(flags: Namespace, console: Console) -> list[dict[str, Any]]:
    from veratune_lab.bench.peers import OTHERS, OURS, Peer
    from veratune_lab.bench.steps import shape_of, step

    shape = shape_of(flags.model)
    rank, layers = flags.rank or shape.rank, flags.blocks or shape.quick
    peers = [*OTHERS, Peer("peft-vera", rank), Peer(OURS, rank, flags.plan)]
    if flags.basis != "random":
        peers.append(Peer(OURS, rank, flags.plan, flags.basis))
    with console.status(flags.model) as status:
        lines = step(
            flags.model,
            rank=rank,
            layers=layers,
            peers=peers,
            seconds=flags.seconds,
            told=status.update,
        )
    return lines


def _serve(flags: Namespace, console: Console) -> list[dict[str, Any]]:
    from veratune.serving.engine.loop import run_in_temporary_thread
    from veratune.tasks.text.language import Instruction
    from veratune_lab.bench.serve import measure

    load, task = split(flags, Load), Instruction()
    config = VeraConfig(rank=flags.rank, targets=tuple(flags.targets))

    def ready() -> tuple[Any, Any]:
        tokenizer = task.load_processor(flags.model)
        return task.load_model(flags.model, tokenizer, dtype=flags.base_dtype).requires_grad_(
            False
        ).eval(), tokenizer

    with console.status("loading") as status:
        return measure(*run_in_temporary_thread(ready), config, load, status.update)


def _load(flags: Namespace, console: Console) -> list[dict[str, Any]]:
    from veratune_lab.bench.serve import against

    load = split(flags, OpenLoad)
    key = None if flags.key is None else os.environ.get(flags.key)
    if flags.key is not None and key is None:
        raise UsageError(f"--key names the environment variable {flags.key}, which is not set")
    with console.status(f"{flags.url}") as status:
        return [asyncio.run(against(flags.url, key, load, status.update))]


def _append(path: str | None, lines: list[dict[str, Any]]) -> None:
    if path is not None:
        with Path(path).open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def _name(line: dict[str, Any]) -> str:
    from veratune_lab.bench.peers import Peer

    return Peer(line["method"], line["rank"], line["plan"], line.get("basis", "random")).name


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _steps(lines: list[dict[str, Any]]) -> Table:
    from veratune_lab.bench.steps import shape_of

    first = lines[0]
    shape = shape_of(first["model"])
    rows, length = first["batch"]
    table = _table(
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


def _layers(lines: list[dict[str, Any]]) -> Table:
    table = _table(
        "Forward and backward of one layer, over the frozen one",
        ("T, n -> m", "method", "plan", "over frozen"),
    )
    for line in lines:
        where = f"{line['T']}, {line['n']} -> {line['m']}"
        table.add_row(where, _name(line), line.get("chosen", ""), f"{line['over_frozen']:.2f}")
    return table


def _plans(lines: list[dict[str, Any]]) -> Table:
    table = _table(
        "Estimated milliseconds beyond the frozen layer",
        ("T, n -> m, rank", "frozen", *PLANS, "taken"),
    )
    for line in lines:
        costs = (f"{1e3 * line['seconds'][plan]:.1f}" for plan in PLANS)
        kept = (
            ""
            if line["plan"] == "factored"
            else ", W + ΔW kept"
            if line["keep"]
            else ", W + ΔW made twice"
        )
        table.add_row(
            f"{line['T']}, {line['n']} -> {line['m']}, {line['rank']}\n({', '.join(line['layers'])})", f"{1e3 * line['frozen']:.1f}",
            *costs, line["plan"] + kept,
        )  # fmt: skip
    return table


def _served(lines: list[dict[str, Any]]) -> Table:
    table = _table("Serving", ("", "measured"))
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
            table.add_row("from the store into a slot", _times(line["load"]))
        elif line["what"] == "conversation":
            title = f"first token of turn {line['turns']} of a conversation, {line['last_prompt']} tokens"
            kept, again = line["first_token_kept_ms"][-1], line["first_token_read_again_ms"][-1]
            table.add_row(
                title, f"{kept:,.0f} ms; {again:,.0f} ms with nothing kept of the turns before"
            )
        elif line["what"] == "cold start":
            for kind in ("warm", "cold"):
                table.add_row(f"first token, adapter {kind}", _times(line[f"first_token_{kind}"]))
                table.add_row(
                    f"  until it has its adapter, {kind}", _times(line[f"adapter_{kind}"])
                )
        else:
            title = f"open load, {line['rate']:g} requests/s of {line['distinct_tenants']} tenants"
            failed = f", {line['failed']} failed" if line["failed"] else ""
            table.add_row(title, f"{line['tokens_per_second']:.1f} tokens/s{failed}")
            table.add_row("  first token", _times(line["first_token"]))
            table.add_row("  each token", _times(line["each_token"]))
    return table


def _times(found: dict[str, float]) -> str:
    return ", ".join(f"{name.removesuffix('_ms')} {value:,.1f} ms" for name, value in found.items())


def _figures(lines: list[dict[str, Any]]) -> Table:
    line = lines[0]
    table = _table(f"This machine's {line['device']}, stored in {line['file']}", ("", "measured"))
    for name, unit, scale in (
        ("flops", "GFLOP/s", 1e-9), ("read", "GB/s read by a product", 1e-9), ("write", "GB/s written", 1e-9),
        ("write_large", "GB/s written over 32 MB", 1e-9), ("call", "microseconds a call", 1e6),
    ):  # fmt: skip
        table.add_row(unit, f"{line[name] * scale:.1f}")
    return table


# Each form's measuring and its table.
_RUN: dict[str, tuple[Callable[[Namespace, Console], list[dict[str, Any]]], Callable[[list[dict[str, Any]]], Table]]] = {
    "step": (_model, _steps), "layers": (_grid, _layers), "calibrate": (_calibrate, _figures), "explain": (_explain, _plans), "serve": (_serve, _served), "load": (_load, _served),
}  # fmt: skip
