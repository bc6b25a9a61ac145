"""How fast are A and B made? Values per second on one core, beside torch's own generator (which is what PEFT draws with).

    python benchmarks/bench_basis.py

Interleaved runs in one process, medians; one JSON line a case into results/basis.jsonl.
"""

import json
import statistics
import time
from pathlib import Path

import torch

from veratune.analysis.machine import describe_machine
from veratune.basis.basis import RandomBasis

LINES = Path(__file__).parent / "results" / "basis.jsonl"
SHAPES = ((1024, 768), (1024, 4096), (11008, 256))
REPEATS = 9


def seconds(make) -> float:
    start = time.perf_counter()
    make()
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    lines = []
    for rows, columns in SHAPES:
        out = torch.empty(rows, columns)
        uniform, normal = (
            RandomBasis(0, init, "shared") for init in ("kaiming_uniform", "kaiming_normal")
        )
        generator = torch.Generator().manual_seed(0)
        cases = {
            "kaiming_uniform": lambda u=uniform, o=out: u.generate("A", o),
            "kaiming_normal": lambda n=normal, o=out: n.generate("A", o),
            "torch.uniform_": lambda g=generator, o=out: o.uniform_(-1, 1, generator=g),
        }
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(REPEATS):
            for name, make in cases.items():
                times[name].append(seconds(make))
        for name, found in times.items():
            rates = sorted(rows * columns / t / 1e6 for t in found)
            lines.append(
                {
                    "case": name, "rows": rows, "columns": columns, "million_values_per_second": round(statistics.median(rates), 1),
                    "lowest": round(rates[0], 1), "highest": round(rates[-1], 1), **describe_machine(),
                }
            )  # fmt: skip
            print(lines[-1])
    LINES.parent.mkdir(exist_ok=True)
    LINES.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
