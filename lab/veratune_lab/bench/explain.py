"""Which plan a model's layers take, and what each plan would cost."""

import collections
from typing import Any

import torch

from veratune.config import PLANS, VeraConfig
from veratune.ops.plans import Call, cheapest, machine_of, seconds, with_memory_policy
from veratune.targets import find_sites
from veratune_lab.bench.steps import shape_of


def explain(model: str, rank: int | None = None) -> list[dict[str, Any]]:
    """A line for each size of layer: estimated seconds of every plan beyond the frozen layer, and the one that is taken.

    model: a model of the benchmark. It is not computed.
    """
    shape = shape_of(model)
    rank = rank or shape.rank
    T = shape.batch[0] * shape.batch[1]
    with torch.device("meta"):
        base = shape.make(1)
    machine = machine_of(torch.device("cpu"))
    found: dict[tuple[int, int], list[str]] = collections.defaultdict(list)
    for site in find_sites(base, VeraConfig(rank=rank, targets=shape.targets)):
        found[site.shape].append(site.name.rpartition(".")[2])
    lines = []
    for (m, n), names in found.items():
        call = Call(T=T, m=m, n=n, r=rank)
        choice = cheapest(call, machine)
        lines.append(
            {
                "layers": names, "T": T, "n": n, "m": m, "rank": rank, "plan": choice.plan, "keep": choice.keep,
                "frozen": 4 * T * m * n / machine.flops,
                "seconds": {plan: seconds(call, with_memory_policy(call, plan), machine) for plan in PLANS},
            }
        )  # fmt: skip
    return lines
