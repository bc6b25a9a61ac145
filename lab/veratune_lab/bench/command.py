"""python -m veratune_lab bench: parse the flags of one benchmark, run it, write and print its lines."""

import asyncio
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from veratune.cli.parsing import Parser, UsageError, new_parser, parse, print_json, split
from veratune.config import BasisKind, Plan, VeraConfig
from veratune.errors import near
from veratune_lab.bench import tables
from veratune_lab.bench.load import Load, OpenLoad

if TYPE_CHECKING:
    from veratune_lab.bench.measure import Timing

PROG = "python -m veratune_lab bench"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark of the command.

    Args:
        about: one sentence for --help.
        add_flags: adds its own flags to a parser.
        measure: runs it and returns its lines.
        show: makes a table of the lines.
        appends: measure appends to --out itself, because it takes long.
    """

    about: str
    add_flags: Callable[[Parser], None]
    measure: Callable[[Namespace, Console], list[dict[str, Any]]]
    show: Callable[[list[dict[str, Any]]], Table]
    appends: bool = False


def parser(name: str = "step") -> Parser:
    """The flags of one benchmark."""
    benchmark = BENCHMARKS[name]
    out = new_parser(name, benchmark.about, prog=PROG)
    benchmark.add_flags(out)
    out.add_argument("--out", type=str | None, default=None, help="append JSON lines to this file")
    out.add_argument("--json", type=bool, default=False, help="print the lines as one JSON list")
    return out


def run(argv: Sequence[str]) -> int:
    """Run one benchmark; without a name, `step`."""
    words = list(argv)
    name = words.pop(0) if words and not words[0].startswith("-") else "step"
    if name not in BENCHMARKS:
        hint = near(name, BENCHMARKS)
        raise UsageError(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}{hint}")
    flags = parse(parser(name), words)
    if "threads" in flags:
        import torch

        torch.set_num_threads(flags.threads)
    console = Console(stderr=flags.json, highlight=False)
    benchmark = BENCHMARKS[name]
    lines = benchmark.measure(flags, console)
    if not benchmark.appends:
        _append(flags.out, lines)
    console.print(benchmark.show(lines))
    if flags.json:
        print_json(lines)
    return 0


def _add_threads(out: Parser) -> None:
    out.add_argument("--threads", type=PositiveInt, default=2, help="threads for torch")


def _add_seconds(out: Parser, of: str) -> None:
    out.add_argument(
        "--seconds", type=NonNegativeFloat, default=30.0, help=f"seconds of timing for {of}"
    )
    out.add_argument(
        "--clock",
        type=Literal["wall", "cpu"],
        default="wall",
        help="cpu: CPU time of this process, where other programs run on the machine",
    )
    out.add_argument("--beside", type=str, default="", help="what else runs, for the lines")


def _timing(flags: Namespace) -> "Timing":
    from veratune_lab.bench.measure import Timing

    return Timing(flags.seconds, flags.clock, flags.beside)


def _step_flags(out: Parser) -> None:
    out.add_argument(
        "--model",
        type=str,
        default="roberta-base",
        help="roberta-base, vit-base, llama-1024 or smollm2-135m",
    )
    out.add_argument(
        "--rank", type=PositiveInt | None, default=None, help="VeRA's rank; default the model's"
    )
    out.add_argument("--plan", type=Plan, default="auto", help="veratune's plan")
    out.add_argument(
        "--basis",
        type=BasisKind,
        default="random",
        help="veratune's basis; one other than random is measured beside it",
    )
    out.add_argument(
        "--blocks",
        type=PositiveInt | None,
        default=None,
        help="blocks of the model to build; default enough for two minutes of timing",
    )
    _add_seconds(out, "the model")
    _add_threads(out)


def _step(flags: Namespace, console: Console) -> list[dict[str, Any]]:
    from veratune_lab.bench.peers import OTHERS, OURS, Peer
    from veratune_lab.bench.steps import shape_of, step

    shape = shape_of(flags.model)
    rank, layers = flags.rank or shape.rank, flags.blocks or shape.quick
    peers = [*OTHERS, Peer("peft-vera", rank), Peer(OURS, rank, flags.plan)]
    if flags.basis != "random":
        peers.append(Peer(OURS, rank, flags.plan, flags.basis))
    with console.status(flags.model) as status:
        return step(
            flags.model,
            rank=rank,
            layers=layers,
            peers=peers,
            timing=_timing(flags),
            log=status.update,
        )


def _layer_flags(out: Parser) -> None:
    out.add_argument(
        "--plans", type=bool, default=False, help="measure every plan, not only the one taken"
    )
    out.add_argument(
        "--basis",
        type=BasisKind,
        default="random",
        help="veratune's basis; one other than random is measured beside LoRA alone",
    )
    _add_seconds(out, "each cell of the grid")
    _add_threads(out)


def _layers(flags: Namespace, console: Console) -> list[dict[str, Any]]:
    from veratune_lab.bench.layers import SIZES, TOKENS, grid

    cells = [(T, size) for T in TOKENS for size in SIZES]
    lines: list[dict[str, Any]] = []
    for T, size in track(cells, description="layers", console=console, disable=flags.json):
        cell = list(grid([T], [size], plans=flags.plans, basis=flags.basis, timing=_timing(flags)))
        _append(flags.out, cell)
        lines += cell
    return lines


def _serve_flags(out: Parser) -> None:
    out.add_argument(
        "--model", type=str, required=True, help="causal base model: folder, .gguf file or hub id"
    )
    out.add_argument("--rank", type=PositiveInt, default=256, help="rank of the adapters")
    out.add_argument(
        "--targets", type=list[str], default=["query", "value"], help="layers that they adapt"
    )
    out.add_argument(
        "--base-dtype",
        type=Literal["float32", "bfloat16", "float16"],
        default="float32",
        help="dtype of the base model",
    )
    out.add_class_arguments(Load)
    _add_threads(out)


def _serve(flags: Namespace, console: Console) -> list[dict[str, Any]]:
    from veratune.serving.engine.threads import run_in_temporary_thread
    from veratune.tasks.text.language import Instruction
    from veratune_lab.bench.serve import measure

    load, task = split(flags, Load), Instruction()
    config = VeraConfig(rank=flags.rank, targets=tuple(flags.targets))

    def load_base() -> tuple[Any, Any]:
        tokenizer = task.load_processor(flags.model)
        model = task.load_model(flags.model, tokenizer, dtype=flags.base_dtype)
        return model.requires_grad_(False).eval(), tokenizer

    with console.status("loading") as status:
        return measure(*run_in_temporary_thread(load_base), config, load, status.update)


def _load_flags(out: Parser) -> None:
    out.add_argument("--url", type=str, required=True, help="the server's URL, without /v1")
    out.add_argument(
        "--key", type=str | None, default=None, help="environment variable that holds its API key"
    )
    out.add_class_arguments(OpenLoad)


def _load(flags: Namespace, console: Console) -> list[dict[str, Any]]:
    from veratune_lab.bench.serve import against

    load = split(flags, OpenLoad)
    key = None if flags.key is None else os.environ.get(flags.key)
    if flags.key is not None and key is None:
        raise UsageError(f"--key names the environment variable {flags.key}, which is not set")
    with console.status(flags.url) as status:
        return [asyncio.run(against(flags.url, key, load, status.update))]


def _append(path: str | None, lines: list[dict[str, Any]]) -> None:
    if path is not None:
        with Path(path).open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


BENCHMARKS = {
    "step": Benchmark(
        "Time a training step of a whole model with random weights, beside the frozen model, full "
        "fine-tuning, and PEFT's LoRA and VeRA.",
        _step_flags,
        _step,
        tables.step_table,
    ),
    "layers": Benchmark(
        "Time one layer in many sizes, beside the same.",
        _layer_flags,
        _layers,
        tables.layer_table,
        appends=True,
    ),
    "serve": Benchmark(
        "Measure many tenants on one engine, beside one tenant, the base alone and PEFT's mixed "
        "batches.",
        _serve_flags,
        _serve,
        tables.serving_table,
    ),
    "load": Benchmark(
        "Send random load to a running OpenAI-compatible server; its models are the tenants.",
        _load_flags,
        _load,
        tables.serving_table,
    ),
}
