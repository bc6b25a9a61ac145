"""A small adapter with known values, made without any model."""

import torch

from veratune.adapter import Adapter
from veratune.config import VeraConfig


def small(**settings) -> Adapter:
    config = VeraConfig(rank=2, targets=["q"], **settings)
    return Adapter(
        config, {"x.q": (3, 4), "y.q": (3, 4)},
        {"x.q": torch.tensor([0.5, -1.0]), "y.q": torch.tensor([0.25, 2.0])},
        {"x.q": torch.tensor([1.0, 2.0, 3.0]), "y.q": torch.tensor([0.0, -0.5, 8.0])},
        base_id="a base", weight_fingerprint=torch.arange(64).bfloat16(), task={"name": "instruction"},
    )  # fmt: skip
