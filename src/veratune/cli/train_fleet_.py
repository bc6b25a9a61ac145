"""The command veratune train-fleet."""

import os
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from veratune.cli.parsing import Parser, add_recipe, new_parser, parse, print_json, split
from veratune.cli.train_ import SKIPPED
from veratune.config import VeraConfig
from veratune.training.fleet.settings import FleetSettings
from veratune.training.settings import TrainSettings


def parser() -> Parser:
    out = new_parser(
        "train-fleet",
        "Train one adapter per tenant, many tenants in each batch. The data has a tenant column, "
        "or is a folder with one file per tenant.",
    )
    out.add_argument("--config", type=str, help="YAML file of these settings; flags override it")
    add_recipe(out)
    out.add_argument("--json", type=bool, default=False, help="print the result as one JSON object")
    out.add_class_arguments(FleetSettings)
    out.add_class_arguments(TrainSettings)
    out.add_class_arguments(VeraConfig, skip=SKIPPED)
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    settings, vera = split(flags, TrainSettings), split(flags, VeraConfig)
    fleet = split(flags, FleetSettings)
    from veratune.fleet.fleet import draw_fleet, run_fleet
    from veratune.tasks.registry import task_class

    main = os.environ.get("RANK", "0") == "0"
    console = Console(quiet=flags.json or not main, highlight=False)
    with _progress(quiet=flags.json or not main) as bar:
        shown = bar.add_task("", total=None, rate="")
        start, begun = time.monotonic(), -1

        def finished(line: dict[str, Any], done: int, total: int) -> None:
            nonlocal begun
            begun = done - 1 if begun < 0 else begun
            rate = (done - begun) / max(1e-9, time.monotonic() - start) * 3600
            bar.update(shown, completed=done, total=total, rate=f"{rate:,.0f} tenants/h")
            if line["status"] == "refused":
                bar.console.print(f"refused: {line['reason']}", style="yellow", soft_wrap=True)

        result = run_fleet(settings, vera, fleet, finished=finished)
    if not main:
        return 0
    pictures = draw_fleet(settings, fleet)
    if flags.json:
        print_json(
            {
                key: getattr(result, key)
                for key in ("out", "tenants", "trained", "refused", "steps", "seconds", "bytes")
            }
        )
    console.print(report(result, task_class(settings.task).metric))
    for picture in pictures:
        console.print(f"picture: {picture}")
    return 0


def _progress(quiet: bool) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tenants  {task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet,
    )


def report(result: Any, metric: str) -> Table:
    """A fleet's result as a table."""
    table = Table(title="VeRA fleet", title_justify="left", show_header=False)
    table.add_row("tenants", f"{result.tenants:,}")
    table.add_row("trained", f"{result.trained:,}")
    table.add_row("refused", f"{result.refused:,}")
    table.add_row("optimizer steps", f"{result.steps:,}")
    table.add_row("time", f"{result.seconds:,.0f} s")
    if result.seconds:
        table.add_row("adapters per hour", f"{result.trained / result.seconds * 3600:,.0f}")
    if result.trained:
        table.add_row("bytes per adapter", f"{result.bytes / result.trained:,.0f}")
    scored = [line for line in result.results if metric in line.get("after", {})]
    if scored:
        for when in ("before", "after"):
            values = [line[when][metric] for line in scored if metric in line[when]]
            if values:
                table.add_row(f"mean {metric} {when}", f"{sum(values) / len(values):.4f}")
        best = max(scored, key=lambda line: line["after"][metric])
        worst = min(scored, key=lambda line: line["after"][metric])
        table.add_row(f"highest {metric}", f"{best['after'][metric]:.4f} ({best['tenant']})")
        table.add_row(f"lowest {metric}", f"{worst['after'][metric]:.4f} ({worst['tenant']})")
    return table
