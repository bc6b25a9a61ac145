"""One linear layer, forward and backward: the grid of rows, sizes and ranks."""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from veratune.analysis.machine import describe_machine
from veratune.config import PLANS
from veratune.layers.linear import VeraLinear
from veratune.ops.linear import plan_of
from veratune.ops.matrix import RowBlocks
from veratune_lab.bench.measure import Timing, flops, saved_bytes, summary
from veratune_lab.bench.peers import FROZEN, OTHERS, OURS, Peer, adapted

TOKENS = (64, 512, 2048, 8192)
SIZES = ((384, 384), (768, 768), (768, 3072), (2048, 2048))
RANKS = (16, 256, 1024)
DEFAULT_TIMING = Timing(seconds=6.0)


def grid(
    tokens: Iterable[int] = TOKENS,
    sizes: Iterable[tuple[int, int]] = SIZES,
    ranks: Iterable[int] = RANKS,
    *,
    plans: bool = False,
    basis: str = "random",
    timing: Timing = DEFAULT_TIMING,
) -> Iterator[dict[str, Any]]:
    """One line for each (T, n -> m, r, contestant).

    plans: every plan of veratune's too, not only the one that is chosen; basis: one other than random is measured beside LoRA alone; timing: of each (T, n -> m).
    """
    where = timing.describe() | describe_machine()
    for T, (n, m) in itertools.product(tokens, sizes):
        peers = [*OTHERS] if basis == "random" else [Peer(FROZEN), Peer("lora", 8)]
        for r in ranks:
            peers += [Peer("peft-vera", r)] if basis == "random" else []
            peers.append(Peer(OURS, r, basis=basis))
            peers += [Peer(OURS, r, plan, basis) for plan in PLANS] if plans else []
        yield from _cell(T, n, m, peers, timing, where)


def _cell(
    T: int, n: int, m: int, peers: list[Peer], timing: Timing, where: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(n, m))
    x, grad = torch.randn(T, n, requires_grad=True), torch.randn(T, m)
    models = {peer: adapted(base, peer, ["0"]) for peer in peers}

    def step(model: nn.Module) -> Any:
        def run() -> None:
            own = x.detach().requires_grad_()  # one layer's input is not another contestant's
            torch.autograd.backward(model(own), grad)
            model.zero_grad()

        return run

    steps = {peer.name: step(models[peer]) for peer in peers}
    counted = {peer.name: flops(steps[peer.name]) for peer in peers}
    kept = {
        peer.name: saved_bytes(functools.partial(models[peer], x), models[peer]) for peer in peers
    }
    times = timing.measure(steps)
    for peer in peers:
        line = {
            "T": T, "n": n, "m": m, "method": peer.kind, "rank": peer.rank, "plan": peer.plan, "basis": peer.basis,
            **summary(times[peer.name], times[FROZEN]),
            "flops_over_frozen": round(counted[peer.name] / counted[FROZEN], 3),
            "flops_beyond_frozen": counted[peer.name] - counted[FROZEN], "saved_bytes": kept[peer.name],
        }  # fmt: skip
        layer = next(models[peer].children())
        if isinstance(layer, VeraLinear):
            line["chosen"] = _chosen(layer, x)
        yield {**line, **where}


def _chosen(layer: VeraLinear, x: torch.Tensor) -> str:
    (own,) = layer.vectors("default")
    A, B = own.pair(x.device, x.dtype)
    grid_rows = A.values.shape[0] if isinstance(A, RowBlocks) else 0
    return plan_of(
        x,
        A,
        B,
        (own.d, own.b),
        own.config.plan,
        in_weight=True,
        own_weight=True,
        grid_rows=grid_rows,
    ).plan
