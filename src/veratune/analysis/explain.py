"""Estimate what each plan costs for a model's layers, from its configuration alone."""

import collections
import dataclasses

import torch
from torch import nn

from veratune.analysis.count import empty_model
from veratune.config import PLANS, VeraConfig
from veratune.errors import UnsupportedError
from veratune.ops.plans import PLANNER, Call, cheapest, seconds, with_memory_policy
from veratune.targets import find_sites


@dataclasses.dataclass(frozen=True)
class PlanEstimate:
    """The estimated cost of one training step for all adapted layers of one size.

    Args:
        layers: names of the layers, the last part of each.
        tokens: T, the tokens of a step.
        in_features: n.
        out_features: m.
        rank: r.
        plan: the plan that is taken.
        keep: whether its intermediate is kept for the backward pass.
        frozen_seconds: time of the frozen layer's forward and backward pass.
        seconds: time of each plan beyond that.
    """

    layers: list[str]
    tokens: int
    in_features: int
    out_features: int
    rank: int
    plan: str
    keep: bool
    frozen_seconds: float
    seconds: dict[str, float]


def explain(model: str, config: VeraConfig, *, tokens: int) -> list[PlanEstimate]:
    """Estimate every plan for every size of layer. Nothing is computed and no weights are read.

    Args:
        model: A config.json, a folder that holds one, or a Hugging Face id.
        config: The adapter: targets, rank, plan.
        tokens: Tokens of a training step, batch size times length.

    Raises:
        DataError: There is no model configuration.
        TargetError: The targets do not fit the model.
        UnsupportedError: A target is a convolution: its cost depends on the size of its input.
    """
    base = empty_model(model)
    machine = PLANNER.machine(torch.device("cpu"))
    groups: dict[tuple[int, int, int], list[str]] = collections.defaultdict(list)
    for site in find_sites(base, config):
        module = base.get_submodule(site.module)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise UnsupportedError(
                f"{site.name} is a {type(module).__name__}, whose cost depends on the size of its "
                "input; explain estimates linear layers alone"
            )
        groups[*site.shape, site.rank].append(site.name.rpartition(".")[2])
    estimates = []
    for (m, n, r), layers in groups.items():
        call = Call(T=tokens, m=m, n=n, r=r)
        choice = (
            cheapest(call, machine)
            if config.plan == "auto"
            else with_memory_policy(call, config.plan)
        )
        estimates.append(
            PlanEstimate(
                layers=layers,
                tokens=tokens,
                in_features=n,
                out_features=m,
                rank=r,
                plan=choice.plan,
                keep=choice.keep,
                frozen_seconds=4 * tokens * m * n / machine.flops,
                seconds={
                    plan: seconds(call, with_memory_policy(call, plan), machine) for plan in PLANS
                },
            )
        )
    return estimates
