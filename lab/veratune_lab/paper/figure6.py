"""Figure 6: how well PQ (LoRA) and X d Y b (VeRA) fit random 10 x 10 matrices, at equal numbers of trained values."""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from veratune.basis.basis import new_basis
from veratune.config import VeraConfig
from veratune_lab.paper.experiment import Cell, Experiment, Line, Place, Scale, table

SIDE, MATRICES = 10, 20
LORA_RANKS = (1, 2, 3, 4, 5)
VERA_RANKS = (1, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90)


class Figure6(Experiment):
    name = "figure6"
    about = "mean squared error of PQ and X d Y b on random 10 x 10 matrices (VeRA, figure 6)"
    seeds = {"quick": 1, "scaled": 3, "full": 5}

    def cells(self, scale: Scale) -> list[Cell]:
        lora = [("LoRA", r, 2 * SIDE * r) for r in LORA_RANKS]
        vera = [("VeRA", r, SIDE + r) for r in VERA_RANKS]
        return [
            Cell(
                name=f"{method}, rank {rank}", shown={"method": method, "rank": rank, "trained": values},
                run=functools.partial(self._run, method, rank, 20 if scale == "quick" else 100),
            )
            for method, rank, values in (*lora, *vera)
        ]  # fmt: skip

    @staticmethod
    def _run(method: str, rank: int, rounds: int, place: Place, seed: int, folder: Path) -> Line:
        targets = torch.randn(
            MATRICES, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        if method == "LoRA":
            tail = torch.linalg.svdvals(targets)[:, rank:]
            return {"mse": float(tail.square().sum(1).mean() / SIDE**2)}
        return {"mse": float(torch.stack([fit(m, rank, seed, rounds) for m in targets]).mean())}

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        values = sorted({line["trained"] for line in lines})
        by = {
            (line["method"], line["trained"]): [
                x["mse"]
                for x in lines
                if (x["method"], x["trained"]) == (line["method"], line["trained"])
            ]
            for line in lines
        }

        def mean(method: str, count: int) -> str:
            found = by.get((method, count))
            return f"{sum(found) / len(found):.3f}" if found else "-"

        return "\n".join([
            f"# {self.name}: {self.about}", "",
            table(["trained values", "PQ", "X d Y b"], [[v, mean("LoRA", v), mean("VeRA", v)] for v in values]),
            f"Mean over {MATRICES} matrices of standard normal values for each seed; their own mean square is 1. PQ is the best there is (truncated singular values); "
            "X and Y are Kaiming uniform, d and b are fitted by least squares in turns, 100 rounds, so VeRA's error is an upper bound. "
            "The paper says neither optimiser, steps nor number of matrices; it finds that both do equally well for a number of values, and that VeRA goes below LoRA's rank 1.", "",
        ])  # fmt: skip

    def draw(self, lines: Sequence[Line], place: Place) -> list[Path]:
        """mse.png"""
        from veratune.analysis.pictures import draw_lines

        found: dict[str, dict[float, list[float]]] = {}
        for line in lines:
            found.setdefault(
                {"LoRA": "PQ (LoRA)", "VeRA": "X d Y b (VeRA)"}[line["method"]], {}
            ).setdefault(line["trained"], []).append(line["mse"])
        series = {
            name: sorted((x, sum(ys) / len(ys)) for x, ys in points.items())
            for name, points in found.items()
        }
        return [draw_lines(series, place.out / "mse.png", "trained values", "mean squared error")]


def fit(target: Tensor, rank: int, seed: int, rounds: int) -> Tensor:
    """Mean squared error of b * (B (d * A)) against a matrix, d and b fitted in turns from d = 1.

    Given b, the matrix is linear in d, and given d each row is linear in its own b: least squares both times, so the error never grows.
    """
    m, n = target.shape
    config = VeraConfig(rank=rank, seed=seed)
    basis = new_basis(config, {"x": (m, n)})
    basis.reserve([("x", m, n, rank)], torch.device("cpu"), torch.float64)
    A, B = (
        torch.as_tensor(x, dtype=torch.float64)
        for x in basis.pair("x", m, n, rank, torch.device("cpu"), torch.float64)
    )
    d = torch.ones(rank, dtype=torch.float64)
    for _ in range(rounds):
        rows = (B * d) @ A
        b = (rows * target).sum(1) / rows.square().sum(1).clamp_min(1e-30)
        products = ((b[:, None] * B)[:, None, :] * A.T[None]).reshape(m * n, rank)
        d = torch.linalg.lstsq(products, target.reshape(-1, 1), driver="gelsd").solution[:, 0]
    rows = (B * d) @ A
    b = (rows * target).sum(1) / rows.square().sum(1).clamp_min(1e-30)
    return (target - b[:, None] * rows).square().mean()
