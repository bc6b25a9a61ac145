"""The command veratune explain."""

import dataclasses
from collections.abc import Sequence

from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.table import Table

from veratune.cli.parsing import Parser, add_json, new_parser, parse, print_json, split
from veratune.config import PLANS, VeraConfig

# Settings that no cost depends on.
SKIPPED = {"seed", "dtype", "head", "dropout", "d_init"}


def parser() -> Parser:
    out = new_parser(
        "explain",
        "Estimate the cost of each plan for a model's layers and show which one plan=auto takes. "
        "Reads the model's configuration alone.",
    )
    out.add_argument("--config", type=str, help="YAML file of these settings; flags overrule it")
    out.add_argument(
        "--model", type=str, required=True, help="config.json, a folder that holds one, or a hub id"
    )
    out.add_argument("--batch", type=PositiveInt, default=16, help="sequences in a training step")
    out.add_argument("--length", type=PositiveInt, default=128, help="tokens in a sequence")
    add_json(out, "the estimates")
    out.add_class_arguments(VeraConfig, skip=SKIPPED)
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    from veratune.analysis.explain import explain

    estimates = explain(flags.model, split(flags, VeraConfig), tokens=flags.batch * flags.length)
    if flags.json:
        print_json([dataclasses.asdict(estimate) for estimate in estimates])
        return 0
    table = Table(title="Estimated milliseconds of a training step", title_justify="left")
    for column in ("layers", "frozen", *(f"+ {plan}" for plan in PLANS), "taken"):
        table.add_column(column, justify="right" if column != "layers" else "left")
    for e in estimates:
        names = ", ".join(f"{e.layers.count(name)} {name}" for name in dict.fromkeys(e.layers))
        size = f"{names}\n{e.in_features} -> {e.out_features}, rank {e.rank}, {e.tokens:,} tokens"
        costs = (f"{1e3 * e.seconds[plan]:.1f}" for plan in PLANS)
        table.add_row(size, f"{1e3 * e.frozen_seconds:.1f}", *costs, _taken(e.plan, e.keep))
    Console(highlight=False).print(table)
    return 0


def _taken(plan: str, keep: bool) -> str:
    if plan == "factored":
        return plan
    weight = "ΔW" if plan == "dense" else "W + ΔW"
    return f"{plan}, {weight} {'kept for' if keep else 'recomputed in'} the backward pass"
