"""The command veratune report."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt

from veratune.cli.parsing import Parser, new_parser, parse


def parser() -> Parser:
    out = new_parser(
        "report",
        "Write report.html into the folder of a finished training run: scores before and after, "
        "curves, the loss mask, samples and settings.",
    )
    out.add_argument("--run", type=str, required=True, help="the run's folder, --out of train")
    out.add_argument(
        "--samples",
        type=NonNegativeInt,
        default=4,
        help="prompts that base and adapter complete (task instruction); 0: none, loads no model",
    )
    out.add_argument(
        "--max-new-tokens", type=PositiveInt, default=128, help="longest completion, in tokens"
    )
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    from veratune.training.report import write_report

    print(write_report(Path(flags.run), flags.samples, flags.max_new_tokens))
    return 0
