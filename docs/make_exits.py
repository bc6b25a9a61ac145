"""Fill the measured blocks of docs/exits.md from benchmarks/results/exits.jsonl: python docs/make_exits.py (a test compares them)."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "exits.md"
LINES = ROOT / "benchmarks" / "results" / "exits.jsonl"


def read(measure: str) -> list[dict[str, Any]]:
    """The lines of one measure."""
    lines = [json.loads(line) for line in LINES.read_text().splitlines()]
    return [line for line in lines if line["measure"] == measure]


def storage() -> str:
    """What storage costs in score."""
    lines = read("storage")
    by = {(line["task"], line["storage"]): line for line in lines}
    kinds = list(dict.fromkeys(line["storage"] for line in lines))
    out = [
        f"| Task, score | Values + head | {' | '.join(f'{kind}: bytes | score | loss' for kind in kinds)} |",
        f"|---|---|{'---|---|---|' * len(kinds)}",
    ]
    for task in dict.fromkeys(line["task"] for line in lines):
        cells = []
        for kind in kinds:
            line = by[task, kind]
            cells += [f"{line['bytes']:,}", f"{line[line['score']]:.4f}", f"{line['loss']:.4f}"]
        line = by[task, kinds[0]]
        values = f"{line['values']:,}" + (f" + {line['head']:,}" if line["head"] else "")
        name = f"{line['title']}: {line['score'].replace('_', ' ')}"
        out.append(f"| {name} | {values} | {' | '.join(cells)} |")
    return "\n".join(out)


BLOCKS: dict[str, Callable[[], str]] = {"storage": storage}


def page() -> str:
    """docs/exits.md with its blocks filled."""
    text = PAGE.read_text()
    for name, make in BLOCKS.items():
        pattern = rf"(<!-- measured: {name} -->\n).*?(\n<!-- end -->)"
        text, count = re.subn(pattern, lambda m: m[1] + make() + m[2], text, flags=re.S)  # noqa: B023
        assert count == 1, f"docs/exits.md has no block {name!r}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
