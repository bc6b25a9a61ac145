"""Fill the measured blocks of docs/exits.md from benchmarks/results/exits.jsonl: python docs/make_exits.py (a test compares them)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veratune_lab.pages import fill

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "exits.md"
LINES = ROOT / "benchmarks" / "results" / "exits.jsonl"


def read(measure: str) -> list[dict[str, Any]]:
    """The lines of one measure."""
    lines = [json.loads(line) for line in LINES.read_text().splitlines()]
    return [line for line in lines if line["measure"] == measure]


def llama() -> str:
    """The demo's adapter in llama.cpp, beside veratune."""
    lines = read("llama.cpp")
    out = [
        "| The commands' adapter | Exact match | Loss | Same best token | Largest logit difference |",
        "|---|---|---|---|---|",
    ]
    for line in lines:
        cells = [f"{line['exact_match']:.1%}", f"{line['loss']:.4f}", f"{line['same_tokens']:.1%}"]
        difference = f"{line['logit_difference']:.1e}" if "logit_difference" in line else ""
        out.append(f"| {line['way']} | {' | '.join([*cells, difference])} |")
    first, last = lines[0], lines[-1]
    return "\n".join(
        [
            *out,
            "",
            f"32 held-out prompts; llama-cpp-python {last['llama_cpp_python']}; logits up to "
            f"{last['largest_logit']:.0f}, float32 KV cache. {first['machine']}, torch {first['torch']}, "
            f"beside {first['beside']}.",
        ]
    )


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


BLOCKS: dict[str, Callable[[], str]] = {"llama": llama, "storage": storage}


def page() -> str:
    """docs/exits.md with its blocks filled."""
    return fill(PAGE, BLOCKS)


if __name__ == "__main__":
    PAGE.write_text(page())
