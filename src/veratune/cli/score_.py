"""The command veratune score."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from veratune.cli.parsing import Parser, add_json, new_parser, parse, print_json


def parser() -> Parser:
    out = new_parser(
        "score",
        "Compute BLEU, NIST, METEOR, ROUGE-L and CIDEr of texts, as the E2E challenge does.",
    )
    out.add_argument(
        "--outputs", type=str, required=True, help="file of generated texts, one a line"
    )
    out.add_argument(
        "--references",
        type=str,
        required=True,
        help="file of reference texts, one a line; an empty line ends the group of an output",
    )
    add_json(out, "the scores")
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    from veratune.scoring.nlg import nlg_scores, read_texts

    scores = nlg_scores(*read_texts(Path(flags.outputs), Path(flags.references)))
    if scores.meteor is None:
        Console(stderr=True).print(
            "Java is not installed; METEOR, ROUGE-L and CIDEr need it "
            "(apt install default-jre-headless)"
        )
    if flags.json:
        print_json(dataclasses.asdict(scores))
        return 0
    table = Table("score", "value")
    for name, value in dataclasses.asdict(scores).items():
        table.add_row(name, "needs Java" if value is None else f"{value:.2f}")
    Console().print(table)
    return 0
