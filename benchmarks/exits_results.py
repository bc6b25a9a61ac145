"""benchmarks/results/exits.jsonl: the lines of each measure are replaced together."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINES = ROOT / "benchmarks" / "results" / "exits.jsonl"


def record(measure: str, lines: list[dict[str, Any]], beside: str) -> None:
    """Replace the lines of one measure, with machine, versions and what ran beside it."""
    from veratune.analysis.machine import describe_machine

    others = []
    if LINES.is_file():
        others = [json.loads(line) for line in LINES.read_text().splitlines()]
        others = [line for line in others if line["measure"] != measure]
    about = describe_machine()
    new = [{"measure": measure, **line, "seed": 0, "beside": beside, **about} for line in lines]
    LINES.write_text("".join(json.dumps(line) + "\n" for line in others + new))
