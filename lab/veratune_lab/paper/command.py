"""python -m veratune_lab NAME: run one table or figure of the papers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.markdown import Markdown

from veratune.cli.parsing import Parser, UsageError, add_judge, new_parser, parse, print_json


def parser() -> Parser:
    out = new_parser(
        "NAME",
        "Run a table or figure of the papers and print it beside the published numbers. Without "
        "NAME, list the experiments. `bench` measures speed and memory.",
        prog="python -m veratune_lab",
    )
    out.add_argument(
        "--data",
        type=str | None,
        default=None,
        help="folder of data sets, by their names in docs/data.md",
    )
    out.add_argument(
        "--models",
        type=str | None,
        default=None,
        help="folder of checkpoints, by their names in docs/data.md",
    )
    out.add_argument(
        "--out",
        type=str,
        default="out/reproduce",
        help="folder for results; each experiment has its own in it",
    )
    out.add_argument(
        "--quick",
        type=bool,
        default=False,
        help="minutes: fewer rows and epochs, to see that it works",
    )
    out.add_argument(
        "--full",
        type=bool,
        default=False,
        help="the paper's own setting; most want a GPU and data from the hub",
    )
    out.add_argument(
        "--seeds",
        type=PositiveInt | None,
        default=None,
        help="seeds of each cell, from 0; default the scale's",
    )
    out.add_argument(
        "--only", type=str, default="", help="only the cells whose names hold this word"
    )
    out.add_argument("--threads", type=PositiveInt | None, default=None, help="threads for torch")
    add_judge(out)
    out.add_argument(
        "--device",
        type=Literal["auto", "cpu"],
        default="auto",
        help="auto takes a GPU if there is one",
    )
    out.add_argument("--json", type=bool, default=False, help="print the results as one JSON list")
    return out


def run(argv: Sequence[str]) -> int:
    words = list(argv)
    name = words.pop(0) if words and not words[0].startswith("-") else None
    flags = parse(parser(), words)
    from veratune_lab.paper.registry import EXPERIMENTS, experiment

    if name is None:
        for known, kind in EXPERIMENTS.items():
            print(f"  {known:<20} {kind.about}")
        return 0
    if flags.quick and flags.full:
        raise UsageError("--quick and --full exclude one another")
    import torch

    from veratune.scoring.judge import Judge
    from veratune_lab.paper.experiment import PAGE, Place, reproduce

    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    chosen = experiment(name)
    judge = Judge(
        url=flags.judge_url,
        model=flags.judge_model,
        key=flags.judge_key,
        cache=Path(flags.out) / name / "judge.jsonl",
    )
    place = Place(
        out=Path(flags.out) / name, data=Path(flags.data) if flags.data else None,
        models=Path(flags.models) if flags.models else None, device=flags.device, judge=judge if flags.judge_url or judge.cache.is_file() else None,
    )  # fmt: skip
    scale: Literal["quick", "scaled", "full"] = (
        "quick" if flags.quick else "full" if flags.full else "scaled"
    )
    notes = Console(stderr=True, highlight=False)
    lines = reproduce(chosen, place, scale, flags.seeds, flags.only, notes.print)
    if flags.json:
        print_json(lines)
    else:
        Console(highlight=False).print(Markdown((place.out / PAGE).read_text()))
    notes.print(f"{place.out}: results.jsonl, {PAGE} and pictures")
    return 0
