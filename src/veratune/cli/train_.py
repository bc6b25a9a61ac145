"""The command veratune train."""

import dataclasses
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import NonNegativeInt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from veratune.cli.parsing import Parser, add_recipe, new_parser, parse, print_json, split
from veratune.config import VeraConfig
from veratune.errors import ConfigError
from veratune.training.settings import Range, TrainSettings

SKIPPED = {"seed", "dtype"}  # the run has flags of its own for these


def parser() -> Parser:
    out = new_parser(
        "train", "Fine-tune a model with VeRA and write the adapter, a file of kilobytes."
    )
    out.add_argument("--config", type=str, help="YAML file of these settings; flags overrule it")
    add_recipe(out)
    out.add_argument(
        "--sweep",
        type=str,
        default="",
        help="train for every value, as lr=1e-3,4e-3;rank=64,256, and rank the runs; with "
        "--sweep-trials, a range is written lr=1e-3..1e-1",
    )
    out.add_argument(
        "--sweep-trials",
        type=NonNegativeInt,
        default=0,
        help="let Optuna choose values for so many trials, and stop bad ones early; 0: all values",
    )
    out.add_argument(
        "--push-to-hub",
        type=str | None,
        default=None,
        help="upload the adapter and its model card to this repository, USER/NAME",
    )
    out.add_argument(
        "--private", type=bool, default=False, help="make a new repository private (push-to-hub)"
    )
    out.add_argument("--json", type=bool, default=False, help="print the result as one JSON object")
    out.add_class_arguments(TrainSettings)
    out.add_class_arguments(VeraConfig, skip=SKIPPED)
    return out


def know_rollouts(settings: TrainSettings) -> None:
    """Make the engine known to task grpo, if a run generates its rollouts with it."""
    if settings.rollouts == "engine":
        from veratune.fleet.rollouts import register

        register()


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), with_find_lr(argv))
    settings, vera = split(flags, TrainSettings), split(flags, VeraConfig)
    from veratune.formats.hub import parse_address
    from veratune.formats.publish import publish
    from veratune.training.run import train
    from veratune.training.search import search
    from veratune.training.sweep import sweep

    know_rollouts(settings)
    console = Console(quiet=flags.json or os.environ.get("RANK", "0") != "0", highlight=False)
    if flags.sweep_trials and not flags.sweep:
        raise ConfigError(
            "--sweep-trials wants the settings to choose, such as --sweep lr=1e-3..1e-1"
        )
    if flags.sweep:
        if flags.push_to_hub is not None:
            raise ConfigError("--push-to-hub uploads one run, not a sweep; push the best with push")
        grid = sweep_grid(flags.sweep, bool(flags.sweep_trials))
        show = preview_on(console)
        results = (
            search(settings, vera, grid, flags.sweep_trials, show)
            if flags.sweep_trials
            else sweep(settings, vera, grid, show)
        )
        if flags.json:
            print_json(
                [{"settings": chosen, **dataclasses.asdict(result)} for chosen, result in results]
            )
        console.print(_ranking(results))
        console.print(f"The best adapter: {settings.out}/adapter.safetensors")
        return 0
    repo = None if flags.push_to_hub is None else parse_address(flags.push_to_hub).repo
    result = train(settings, vera, preview_on(console))
    if repo is not None and os.environ.get("RANK", "0") == "0":
        with tempfile.TemporaryDirectory() as folder:
            page = publish(
                Path(result.path),
                repo,
                Path(folder) / "files",
                private=flags.private,
                dataset=_dataset_name(settings.data),
            )
        console.print(page, soft_wrap=True)
    if flags.json and os.environ.get("RANK", "0") == "0":
        print_json(dataclasses.asdict(result))
    console.print(report(result))
    console.print(
        f"Try it:  veratune eval --model {settings.model} --adapter {result.path} --data ...",
        soft_wrap=True,
    )
    return 0


def _dataset_name(data: str) -> str:
    """The data set's name for the model card: a hub id, or a local name without the way there."""
    return f"{Path(data).name} (local)" if Path(data).exists() else data


def report(result: Any) -> Table:
    """A training run's result as a table."""
    table = Table(title="VeRA fine-tuning", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, value in result.after.items():
        table.add_row(name, f"{result.before.get(name, math.nan):.4f}", f"{value:.4f}")
    table.add_section()
    table.add_row("trained in d and b", "", f"{result.trained:,}")
    table.add_row("trained in the head", "", f"{result.head:,}")
    table.add_row("adapter file", "", f"{result.bytes / 1024:,.1f} KiB")
    table.add_row("optimizer steps", "", f"{result.steps:,}")
    table.add_row("training time", "", f"{result.seconds:,.0f} s")
    table.add_row("peak memory", "", f"{result.peak_memory / 2**30:,.2f} GiB")
    table.caption = result.path
    return table


def _ranking(results: list[tuple[dict[str, Any], Any]]) -> Table:
    table = Table(title="Sweep, best first", title_justify="left")
    names, scores = list(results[0][0]), list(results[0][1].after)
    for name in names + scores:
        table.add_column(name, justify="right")
    for chosen, result in results:
        table.add_row(*(f"{chosen[n]}" for n in names), *(f"{result.after[s]:.4f}" for s in scores))
    return table


def with_find_lr(argv: Sequence[str]) -> list[str]:
    """The arguments with --find-lr in place of --lr find."""
    words = list(argv)
    for at in range(len(words) - 1):
        if words[at : at + 2] == ["--lr", "find"]:
            words[at : at + 2] = ["--find-lr"]
            break
    return ["--find-lr" if word == "--lr=find" else word for word in words]


def sweep_grid(text: str, ranges: bool = False) -> dict[str, Any]:
    """The values of each setting; a range of them only where `ranges` says so."""
    grid: dict[str, Any] = {}
    for entry in filter(None, text.split(";")):
        name, equals, values = entry.partition("=")
        if not equals or not values:
            raise ConfigError(
                f"--sweep has {entry!r}; name=value,value is wanted, several apart by ';'"
            )
        key = name.strip().replace("-", "_")
        low, dots, high = values.partition("..")
        if dots:
            bounds = _value(low), _value(high)
            numbers = all(isinstance(bound, int | float) for bound in bounds)
            if not ranges or not numbers or not bounds[0] < bounds[1]:
                raise ConfigError(
                    f"--sweep has the range {entry!r}; low..high is wanted, with --sweep-trials"
                )
            grid[key] = Range(*bounds)
            continue
        grid[key] = [_value(value) for value in values.split(",")]
    return grid


def _value(text: str) -> Any:
    try:
        return float(text) if not text.lstrip("-").isdigit() else int(text)
    except ValueError:
        return yaml.safe_load(text)


def preview_on(console: Console) -> Any:
    """Return a function that prints a training example, tokens with loss in green, or between
    [[ and ]] where there are no colours.
    """

    def show(pieces: list[tuple[str, bool]]) -> None:
        plain = console.color_system is None
        text = (
            Text("One training example; the loss is on what is ", style="dim")
            .append("between [[ and ]]" if plain else "green", "green")
            .append(":\n")
        )
        for piece, on in pieces:
            text.append(f"[[{piece}]]" if plain and on else piece, "green" if on else "default")
        console.print(text)

    return show
