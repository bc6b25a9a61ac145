"""The methods that are compared, each with the same number of trials of its learning rate."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from veratune.config import VeraConfig

QV = ("query", "value")
LINEAR = ("all-linear",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """One method.

    Args:
        rates: Learning rates that are tried, each once on seed 0.
        vera: The adapter; for other methods its targets are theirs.
        settings: Settings of the run.
        exact: Compute principal directions by an exact singular value decomposition.
    """

    rates: tuple[float, float, float]
    vera: VeraConfig = dataclasses.field(default_factory=VeraConfig)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    exact: bool = False


def _d_alone(
    rank: int, rates: tuple[float, float, float], basis: Literal["random", "principal"] = "random"
) -> Contestant:
    config = VeraConfig(rank=rank, targets=LINEAR, vectors="d", basis=basis)
    return Contestant(rates=rates, vera=config)


def _peft(name: str, rates: tuple[float, float, float], targets: Any, **options: Any) -> Contestant:
    settings = {"method": f"peft:{name}", "options": options}
    return Contestant(rates=rates, vera=VeraConfig(targets=targets), settings=settings)


CONTESTANTS: dict[str, Contestant] = {
    "principal d, r=64": _d_alone(64, (1e-2, 2e-2, 4e-2), "principal"),
    "random d, r=64": _d_alone(64, (1e-2, 2e-2, 4e-2)),
    "random d, r=192": _d_alone(192, (1e-2, 2e-2, 4e-2)),
    "principal d, r=192": _d_alone(192, (1e-2, 2e-2, 4e-2), "principal"),
    "LoRA r=8, q,v": _peft("lora", (5e-4, 2e-3, 5e-3), QV, r=8, lora_alpha=8),
    "LoRA r=1, all-linear": _peft("lora", (5e-4, 2e-3, 5e-3), LINEAR, r=1, lora_alpha=1),
    "VeRA q,v, r=192": Contestant(rates=(1e-2, 3e-2, 1e-1), vera=VeraConfig(rank=192, targets=QV)),
    "VeRA all-linear, r=192": Contestant(
        rates=(5e-3, 1e-2, 2e-2), vera=VeraConfig(rank=192, targets=LINEAR)
    ),
    "principal d and b, r=192": Contestant(
        rates=(5e-3, 1e-2, 2e-2),
        vera=VeraConfig(rank=192, targets=LINEAR, basis="principal"),
    ),
    "principal d, r=24": _d_alone(24, (1e-2, 2e-2, 4e-2), "principal"),
    "random d, r=24": _d_alone(24, (1e-2, 2e-2, 4e-2)),
    "BitFit": Contestant(rates=(1e-3, 3e-3, 1e-2), settings={"method": "bitfit"}),
    "IA3": _peft("ia3", (5e-3, 1e-2, 2e-2), LINEAR, feedforward_modules=[]),
    "LoRA r=8, all-linear": _peft("lora", (5e-4, 2e-3, 5e-3), LINEAR, r=8, lora_alpha=8),
    "PEFT VeRA q,v, r=192": _peft(
        "vera", (1e-2, 3e-2, 1e-1), QV, r=192, d_initial=0.1, projection_prng_key=0
    ),
    "Uni-LoRA, 2,368": _peft("unilora", (5e-3, 2e-2, 5e-2), LINEAR, r=4, theta_d_length=2368),
    "Uni-LoRA, 7,104": _peft("unilora", (5e-3, 2e-2, 5e-2), LINEAR, r=4, theta_d_length=7104),
    "FourierFT, n=64": _peft("fourierft", (2e-2, 5e-2, 1e-1), LINEAR, n_frequency=64),
    "FourierFT, n=192": _peft("fourierft", (2e-2, 5e-2, 1e-1), LINEAR, n_frequency=192),
    "RoAd 1": _peft("road", (1e-3, 3e-3, 1e-2), LINEAR, variant="road_1", group_size=64),
    "VB-LoRA": _peft(
        "vblora", (3e-3, 1e-2, 3e-2), LINEAR, r=4, num_vectors=64, vector_length=64, topk=2
    ),
    "Full": Contestant(rates=(3e-5, 1e-4, 3e-4), settings={"method": "full", "head_lr": 1e-3}),
    "exact principal d, r=64": dataclasses.replace(_d_alone(64, (1e-2, 2e-2, 4e-2)), exact=True),
    "head alone": Contestant(rates=(5e-3, 1e-2, 3e-2), settings={"method": "head"}),
}
