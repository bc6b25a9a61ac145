"""The command veratune score."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from veratune.cli.parsing import Parser, new_parser, parse, print_json


def parser() -> Parser:
    out = new_parser(
        "score",
        "BLEU, NIST, METEOR, ROUGE-L and CIDEr of texts against references, as the E2E challenge scores them.",
    )
    out.add_argument("--outputs", type=str, required=True, help="a text a line")
    out.add_argument(
        "--references",
        type=str,
        required=True,
        help="a text a line, an empty line between the groups of two outputs",
    )
    out.add_argument("--json", type=bool, default=False, help="print one JSON object")
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    from veratune.scoring.nlg import nlg_scores, read_texts

    found = nlg_scores(*read_texts(Path(flags.outputs), Path(flags.references)))
    if found.meteor is None:
        Console(stderr=True).print(
            "no Java here: METEOR, and the tokenizer of ROUGE-L and CIDEr, need it (apt install default-jre-headless)"
        )
    if flags.json:
        print_json(dataclasses.asdict(found))
        return 0
    shown = Table("score", "value")
    for name, value in dataclasses.asdict(found).items():
        shown.add_row(name, "needs Java" if value is None else f"{value:.2f}")
    Console().print(shown)
    return 0
