"""The command veratune plan."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from veratune.cli.parsing import Parser, add_json, add_recipe, new_parser, parse, print_json, split
from veratune.cli.train_ import SKIPPED, know_rollouts, preview_on
from veratune.config import VeraConfig
from veratune.training.settings import TrainSettings

if TYPE_CHECKING:
    from veratune.training.plan import TrainingPlan


def parser() -> Parser:
    out = new_parser(
        "plan",
        "Check a training run without running it: data, loss mask, and the memory, time and bytes "
        "that it takes on this machine, measured on a few steps.",
    )
    out.add_argument("--config", type=str, help="YAML file of these settings; flags overrule it")
    add_recipe(out)
    out.add_argument(
        "--out", type=str, default="", help="the run's folder; it is checked to be free"
    )
    add_json(out, "the plan")
    out.add_class_arguments(TrainSettings, skip={"out", "resume"})
    out.add_class_arguments(VeraConfig, skip=SKIPPED)
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    settings, vera = split(flags, TrainSettings), split(flags, VeraConfig)
    from veratune.training.plan import plan

    know_rollouts(settings)
    console = Console(quiet=flags.json, highlight=False)
    found = plan(settings, vera, preview_on(console))
    if flags.json:
        print_json(dataclasses.asdict(found))
        return 0
    console.print(table(found))
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True)
    return 0


def table(found: "TrainingPlan") -> Table:
    """A plan as a table."""
    out = Table(title="Training plan", title_justify="left", show_header=False)
    out.add_column()
    out.add_column(justify="right")
    out.add_row("training examples", f"{found.examples:,}")
    if found.evaluation_examples:
        out.add_row("evaluation examples", f"{found.evaluation_examples:,}")
    if found.tokens:
        shown = ", ".join(f"{key} {found.tokens[key]:,}" for key in ("min", "median", "p95", "max"))
        out.add_row("tokens of an example", shown)
        out.add_row("tokens of an epoch", f"{found.tokens['all']:,}")
    if "trained" in found.tokens:
        share = found.tokens["trained"] / found.tokens["all"]
        out.add_row("of these with loss", f"{found.tokens['trained']:,} ({share:.0%})")
    if found.rows:
        out.add_row("packed rows", f"{found.rows:,}")
    out.add_section()
    out.add_row("optimizer steps", f"{found.steps:,}")
    out.add_row("trained in d and b", f"{found.trained:,}")
    out.add_row("trained in the head", f"{found.head:,}")
    out.add_row("adapter file", f"{found.adapter_bytes / 1024:,.1f} KiB")
    out.add_row("peak memory", f"{found.peak_memory / 2**30:,.2f} GiB")
    out.add_row("seconds a step", f"{found.seconds_per_step:,.2f}")
    out.add_row("training", f"{found.train_seconds:,.0f} s")
    out.add_row("evaluations", f"{found.evaluation_seconds:,.0f} s")
    return out
