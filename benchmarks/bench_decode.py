"""What a decoding step costs by the order of its products and of its adapter's, interleaved.

    python benchmarks/bench_decode.py --model MODEL

Each line is a number of rows (sequences): CPU milliseconds of a step, medians of interleaved
repeats, of
    base, W as right factor     torch's F.linear everywhere
    base                        few rows as columns (ops/few_rows.py)
    one tenant, factored        VeRA on query and value, r = 256, beside W x
    one tenant, merged          the same adapter in W + ΔW
and medians of the ratios within a repeat. Appends to results/decode.jsonl.
"""

import argparse
import contextlib
import json
import statistics
import time
import unittest.mock
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import veratune as vt
from veratune.analysis.machine import describe_machine
from veratune.serving.engine.runner import ModelRunner
from veratune.serving.pool.lease import Lease
from veratune.serving.pool.pool import AdapterPool

LINES = Path(__file__).parent / "results" / "decode.jsonl"
ROWS, PROMPT, RANK, MOST = (1, 2, 4, 8, 16, 32), 60, 256, 2**30
CHOICE = "veratune.ops.few_rows.takes_rows_as_columns"
PLAIN, BASE = "base, W as right factor", "base"
FACTORED, MERGED = "one tenant, factored", "one tenant, merged"


def load(path: str) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def random_adapter(path: str) -> vt.Adapter:
    model = vt.attach(load(path), vt.VeraConfig(rank=RANK, targets=("query", "value")), "x")
    for name, p in model.named_parameters():
        if ".vera." in name:
            torch.nn.init.normal_(p, std=0.1)
    return vt.extract(model, "x")


class Steps:
    """Decoding steps of a number of rows, each time at the same place of their KV cache."""

    def __init__(self, path: str) -> None:
        model = load(path)
        self.pool = AdapterPool(model, 1, max_merged_bytes=MOST)
        self.runner = ModelRunner(model, self.pool, max(ROWS), 2 * PROMPT)
        self.lease = self.pool.acquire("x", lambda: random_adapter(path))
        for row in range(0, max(ROWS), 4):
            self.runner.run(row, [list(range(PROMPT))] * 4, [None] * 4)

    def step(self, rows: int, lease: Lease | None) -> float:
        """CPU milliseconds of one step."""
        self.runner.cache.lengths = [PROMPT] * max(ROWS)
        start = time.process_time()
        self.runner.run(0, [[7]] * rows, [lease] * rows)
        return 1e3 * (time.process_time() - start)

    def case(self, name: str, rows: int) -> float:
        plain = unittest.mock.patch(CHOICE, return_value=False)
        with plain if name == PLAIN else contextlib.nullcontext():
            self.pool.merged.max_bytes = 0 if name == FACTORED else MOST
            return self.step(rows, self.lease if name in (FACTORED, MERGED) else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--beside", default="nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = Steps(options.model)
    for _ in range(25):  # until all layers are merged
        steps.step(max(ROWS), steps.lease)
    for rows in options.rows:
        times: dict[str, list[float]] = {PLAIN: [], BASE: [], FACTORED: [], MERGED: []}
        for repeat in range(options.repeats + 1):
            for name, found in times.items():
                cost = steps.case(name, rows)
                if repeat:
                    found.append(cost)

        def ratio(name: str, to: str, times: dict[str, list[float]] = times) -> float:
            pairs = zip(times[name], times[to], strict=True)
            return round(statistics.median(b / a for a, b in pairs), 3)

        line = {
            "what": "decoding step", "rows": rows, "rank": RANK, "targets": ["query", "value"], "prompt": PROMPT,
            "cpu_ms": {name: round(statistics.median(found), 1) for name, found in times.items()},
            "speed_of_columns": ratio(BASE, PLAIN), "speed_of_factored": ratio(FACTORED, BASE), "speed_of_merged": ratio(MERGED, BASE),
            "merged_bytes": steps.pool.merged.bytes, "clock": "CPU milliseconds", "beside": options.beside,
            "model": Path(options.model).name, **describe_machine(),
        }  # fmt: skip
        print(line, flush=True)
        with LINES.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
